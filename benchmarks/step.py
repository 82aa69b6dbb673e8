"""Time and memory of a training step over the step of the frozen backbone.

    python -m benchmarks.step --json benchmarks/results/step-cpu.json

The frozen step is the floor of a technique that trains something at the bottom. All contestants
of a backbone live in one process and take turns, so that drift of the machine meets all of them;
a ratio is taken to the frozen step of the same round, and the median and quartiles over the
rounds are reported. Time is CPU time of the process, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.engines import OURS, Contestant, by_peft, frozen, full, ours

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One technique under one engine.

    Attributes:
        step_over_frozen: median over rounds of CPU time over the frozen step's.
        q1: lower quartile of that ratio; ``q3`` the upper one.
        saved_mib: tensors that autograd keeps for the backward pass, each storage once.
    """

    backbone: str
    technique: str
    engine: str
    device: str
    dtype: str
    threads: int
    step_over_frozen: float
    q1: float
    q3: float
    saved_mib: float


def measure(name: str, techniques: list[str], rounds: int) -> list[Row]:
    """Measure all engines on one backbone."""
    contestants = {("frozen", "backbone"): frozen(name), ("full", "torch"): full(name)}
    for technique in techniques:
        contestants[technique, "peftref"] = ours(name, technique)
        other = by_peft(name, technique)
        if other is not None:
            contestants[technique, f"peft {version('peft')}"] = other
    saved = {key: saved_mib(contestant) for key, contestant in contestants.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contestants}
    for each in contestants.values():
        each.step()
    for number in range(rounds):
        keys = list(contestants)
        for key in keys if number % 2 else reversed(keys):
            times[key].append(cpu_seconds(contestants[key].step))
    floor = times["frozen", "backbone"]
    rows: list[Row] = []
    for (technique, engine), taken in times.items():
        ratios = [mine / base for mine, base in zip(taken, floor, strict=True)]
        q1, median, q3 = statistics.quantiles(ratios, n=4)
        rows.append(Row(
            name, technique, engine, "cpu", "float32", torch.get_num_threads(),
            round(median, 3), round(q1, 3), round(q3, 3), round(saved[technique, engine], 1),
        ))
    return rows


def cpu_seconds(run: Callable[[], None]) -> float:
    """Return the CPU time of one call."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def saved_mib(contestant: Contestant) -> float:
    """Return MiB that autograd keeps between forward and backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in contestant.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contestant.forward()
    total = sum(kept.values()) / MIB
    del loss
    return total


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| backbone | technique | engine | step / frozen | quartiles | saved MiB |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.backbone} | {row.technique} | {row.engine} | {row.step_over_frozen:.2f} | "
            f"{row.q1:.2f} to {row.q3:.2f} | {row.saved_mib:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description="time of a training step over the frozen one's")
    parser.add_argument("--backbones", default="minilm,llama", help="of minilm, d1024, llama")
    parser.add_argument("--techniques", default=";".join(OURS), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[Row] = []
    for name in given.backbones.split(","):
        rows += measure(name, given.techniques.split(";"), given.rounds)
    print(table(rows))
    if given.json is not None:
        packages = ("peftref", "peft", "torch", "transformers")
        told = {
            "machine": platform.processor() or platform.machine(),
            "versions": {name: version(name) for name in packages},
            "rows": [asdict(row) for row in rows],
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
