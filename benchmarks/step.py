"""Time and memory of a training step over the step of the frozen backbone.

    python -m benchmarks.step --json benchmarks/results/step-cpu.json

The frozen step, forward and activation gradients, is the floor of a technique that trains something
at the bottom. All contestants of a backbone live in one process, share its weights and take turns,
so that drift of the machine meets all of them; of each the least time counts. Several processes run
one after the other: the median of their ratios is reported, and the lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.backbones import FAMILY, build, of_shared_weights
from benchmarks.engines import OURS, by_peft, frozen, full, ours
from benchmarks.measure import Contestant, Measured, measure

PACKAGES = ("peftref", "peft", "torch", "transformers")
Found = dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Row:
    """One technique under one engine.

    Attributes:
        step_over_frozen: median over processes of the ratio; ``low`` and ``high`` its spread.
        saved_mib: what autograd keeps for the backward pass, each storage once.
        peak_mib: memory at its highest in a step over that before it.
    """

    backbone: str
    technique: str
    engine: str
    device: str
    dtype: str
    threads: int
    step_over_frozen: float
    low: float
    high: float
    saved_mib: float
    peak_mib: float | None


def contestants(name: str, techniques: Sequence[str], device: str) -> dict[str, Contestant]:
    """All engines on one backbone; the keys are ``technique/engine``."""
    dtype = torch.bfloat16 if name == "llama8b" else torch.float32
    model, inputs = build(name, device, dtype)
    model = model.requires_grad_(False).train()
    found = {"frozen": frozen(of_shared_weights(model), inputs)}
    for technique in techniques:
        found[f"{technique}/peftref"] = ours(of_shared_weights(model), inputs, technique)
        other = by_peft(of_shared_weights(model), inputs, technique, FAMILY[name])
        if other is not None:
            found[f"{technique}/peft {version('peft')}"] = other
    if name != "llama8b":  # whose moments do not fit beside the others
        found["full/torch"] = full(build(name, device, dtype)[0].train(), inputs)
    return found


def worker(given: argparse.Namespace) -> None:
    """Measure one backbone in this process; print JSON."""
    torch.set_num_threads(given.threads)
    torch.set_num_interop_threads(1)
    techniques = given.techniques.split(";")
    found = measure(contestants(given.worker, techniques, given.device), given.rounds, given.clock)
    print(json.dumps({name: _plain(measured) for name, measured in found.items()}))


def _plain(measured: Measured) -> tuple[float, float, float]:
    return measured.ratio, measured.saved_mib, measured.peak_mib


def run(given: argparse.Namespace) -> Iterator[Row]:
    """Start the processes, one after the other, and join what they found."""
    for name in given.backbones.split(","):
        found: list[Found] = []
        for number in range(given.processes):
            print(f"{name}: process {number + 1} of {given.processes}", file=sys.stderr)
            found.append(_process(name, given))
            if given.adapters_python is not None and given.device == "cpu":
                theirs = _adapterhub(name, given)
                found[-1].update({f"{k}/adapters": v for k, v in theirs.items() if k != "frozen"})
        yield from _joined(name, found, given)


def _process(name: str, given: argparse.Namespace) -> Found:
    command = [sys.executable, "-m", "benchmarks.step", "--worker", name]
    options = [f"--techniques={given.techniques}", f"--rounds={given.rounds}",
               f"--threads={given.threads}", f"--clock={given.clock}", f"--device={given.device}"]
    return _output([*command, *options], given.threads)


def _adapterhub(name: str, given: argparse.Namespace) -> Found:
    script = str(Path(__file__).with_name("adapterhub.py"))
    numbers = [str(given.rounds), str(given.threads), given.clock]
    command = [given.adapters_python, script, name, *numbers, *given.techniques.split(";")]
    return _output(command, given.threads)


def _output(command: list[str], threads: int) -> Found:
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, env=settings, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ended.stdout.strip().splitlines()[-1])


def _joined(name: str, found: list[Found], given: argparse.Namespace) -> Iterator[Row]:
    for key in found[0]:
        technique, _, engine = key.partition("/")
        ratios = [each[key][0] for each in found]
        saved, peak = (statistics.median(each[key][i] for each in found) for i in (1, 2))
        yield Row(
            name, technique, engine or "torch", given.device,
            "bfloat16" if name == "llama8b" else "float32", given.threads,
            round(statistics.median(ratios), 3), round(min(ratios), 3), round(max(ratios), 3),
            round(saved, 1), None if math.isnan(peak) else round(peak, 1),
        )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| backbone | technique | engine | step / frozen | spread | saved MiB | peak MiB |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        lines.append(
            f"| {row.backbone} | {row.technique} | {row.engine} | {row.step_over_frozen:.2f} | "
            f"{row.low:.2f} to {row.high:.2f} | {row.saved_mib:.0f} | {peak} |"
        )
    return "\n".join(lines)


def machine(given: argparse.Namespace) -> dict[str, object]:
    """What the numbers hold for."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if given.device != "cpu" else None
    return {
        "machine": gpu or cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "clock": given.clock,
        "processes": given.processes,
        "rounds": given.rounds,
        "versions": {name: version(name) for name in PACKAGES},
    }


def write(path: Path, told: dict[str, object], rows: list[Row]) -> None:
    """Write the rows as JSON, and as a table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**told, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    facts = "\n".join(f"* {key}: {value}" for key, value in told.items())
    text = f"# Step over the frozen step\n\n{facts}\n\n{table(rows)}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="time of a training step over the frozen one's")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--backbones", help="minilm,d1024,llama; on a GPU also llama8b")
    parser.add_argument("--techniques", default=";".join(OURS), help="separated by semicolons")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default=here, choices=["cpu", "cuda"])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: on a machine that others use too, with one thread")
    parser.add_argument("--adapters-python", metavar="PATH",
                        help="interpreter that has adapters 1.3 and its transformers")
    parser.add_argument("--json", type=Path, help="by default benchmarks/results/step-DEVICE.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.backbones is None:
        given.backbones = "minilm,d1024,llama" + (",llama8b" if given.device == "cuda" else "")
    if given.json is None:
        given.json = Path(__file__).parent / "results" / f"step-{given.device}.json"
    return given


def main() -> None:
    """Measure, print a table, and write JSON and Markdown."""
    given = parsed()
    if given.worker is not None:
        worker(given)
        return
    told = machine(given)
    rows = list(run(given))
    print(table(rows))
    write(given.json, told, rows)


if __name__ == "__main__":
    main()
