"""Train every entry of the catalogue on TREC with MiniLM, beside the head on a frozen encoder.

    python -m benchmarks.catalogue --output docs/trained.md [NAME ...]

The learning rate of an entry is its cited one times the first factor of ``RATES`` that beats the
frozen head: cited rates are of runs hundreds of times longer. Results go to the file after every
entry, so that a run that was cut off goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from peftref.cli.facts import shipped
from peftref.errors import PeftRefError
from peftref.training.session import TrainingSession
from peftref.training.settings import RunSettings

__all__ = ["FLOOR_RATES", "RATES", "frozen_head", "session", "train_entry"]

RATES = (16.0, 4.0, 64.0, 1.0)
FLOOR_RATES = (1.0, 4.0)
STEPS = 40
SEED = 0

Result = dict[str, Any]


def session(steps: int = STEPS) -> TrainingSession:
    """Return TREC and MiniLM, loaded once for all entries."""
    return TrainingSession(RunSettings.model_validate({
        "backbone": "minilm", "data": "trec6", "steps": steps, "max_length": 48, "threads": 1,
        "device": "cpu", "evaluation": {"at": [1.0]}, "seed": SEED,
    }))


def frozen_head(given: TrainingSession) -> Result:
    """Return the best score of the head alone, over learning rates."""
    best = max((given.fit("none", rate=rate) for rate in FLOOR_RATES), key=lambda r: r.score)
    return {"score": best.score, "loss": best.loss, "parameters": 0, "rate": None,
            "seconds": best.seconds}


def train_entry(given: TrainingSession, name: str, floor: float) -> Result:
    """Return how an entry trained: at the first rate that beats ``floor``, else at the best."""
    best: Result = {}
    for rate in RATES:
        try:
            result = given.fit(name, rate=rate)
        except PeftRefError as error:
            found: Result = {"error": str(error).splitlines()[0], "rate": rate, "score": -1.0}
        else:
            found = {"score": result.score, "loss": result.loss, "rate": rate,
                     "parameters": result.trainable_parameters, "seconds": result.seconds}
        if not best or found["score"] > best["score"]:
            best = found
        if best["score"] > floor:
            break
    return best


def table(floor: Result, results: dict[str, Result]) -> str:
    """Return the results as a page of Markdown."""
    lines = [
        "# Every entry, trained", "",
        f"TREC-6 with MiniLM-L6, {STEPS} steps, one seed, default parameters, accuracy on the "
        "validation split. A check that each entry learns, no comparison: nothing is tuned, and "
        "the learning rate is the cited one times the first factor of "
        f"{', '.join(f'{rate:g}' for rate in RATES)} that beats the head on the frozen encoder.",
        "", f"The frozen encoder's head: {floor['score']:.3f}.", "",
        "| entry | accuracy | trained parameters | factor | seconds |", "|---|---|---|---|---|",
    ]
    for name, found in sorted(results.items(), key=lambda item: -item[1]["score"]):
        if "error" in found:
            lines.append(f"| `{name}` | {found['error']} | | | |")
            continue
        lines.append(f"| `{name}` | {found['score']:.3f} | {found['parameters']:,} | "
                     f"{found['rate']:g} | {found['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is named, or all that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="entries; without any: all without a result")
    parser.add_argument("--output", type=Path, default=Path("docs/trained.md"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/catalogue.json"))
    given = parser.parse_args()
    done: dict[str, Any] = {}
    if given.results.is_file():
        done = json.loads(given.results.read_text(encoding="utf-8"))
    runs = session()
    floor: Result = done.setdefault("floor", None) or frozen_head(runs)
    done["floor"] = floor
    results: dict[str, Result] = done.setdefault("entries", {})
    names = given.names or [e.name for e in shipped() if e.name not in results]
    for name in names:
        results[name] = train_entry(runs, name, floor["score"])
        print(f"{name}: {results[name]}", flush=True)
        given.results.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        given.output.write_text(table(floor, results), encoding="utf-8")


if __name__ == "__main__":
    main()
