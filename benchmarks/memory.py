"""Memory of a training step: what autograd keeps, the highest point, and what the plan predicts.

    python -m benchmarks.memory --json benchmarks/results/memory-cpu.json

BERT of random weights with 12 layers, without dropout, in float32. Each technique runs in a process
of its own; the peak is over what is held before the step (weights and the optimiser's states).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import peftref
from benchmarks.measure import Contestant, peak_mib, saved_mib, seconds

TECHNIQUES = {
    "full fine-tuning": "",
    "lora q,v": "lora(rank=16)",
    "lora all linears": "lora(rank=16, site='{attention,ffn}.*')",
    "parallel adapter": "parallel_adapter(bottleneck=64)",
    "lora, recomputed layers": "lora(rank=16)",
    "lst": "lst",
    "meft1": "meft(variant=first)",
    "meft2": "meft(variant=second)",
    "meft3": "meft(variant=halves)",
    "meft1, all inverted": "reversible(parallel_adapter(bottleneck=8), "
                           "parallel_adapter(bottleneck=8, site='block'), inversions=99)",
}  # fmt: skip


def contestant(name: str, width: int, rows: int, length: int) -> Contestant:
    """Return the model with a technique, in training mode."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=12, vocab_size=1000,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, ids = BertModel(config).train(), torch.randint(5, 1000, (rows, length))
    parameters = list(model.parameters())
    if TECHNIQUES[name]:
        adapted = peftref.attach(model, TECHNIQUES[name])
        adapted.handled = True
        parameters = list(adapted.trainable.values())
    if "recomputed" in name:
        model.gradient_checkpointing_enable()
    return Contestant(model, ids, torch.optim.AdamW(parameters, lr=1e-5, fused=True))


def measured(name: str, width: int, rows: int, length: int) -> dict[str, object]:
    """Measure one technique in this process."""
    torch.set_num_threads(1)
    found = contestant(name, width, rows, length)
    found.step()
    return {
        "technique": name, "width": width, "rows": rows, "length": length,
        "saved_mib": round(saved_mib(found), 1), "peak_mib": round(peak_mib(found), 1),
        "seconds": round(min(seconds(found, "cpu") for _ in range(2)), 2),
    }  # fmt: skip


def main() -> None:
    """Measure all techniques one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--one", help="measure this one here and print JSON")
    options = parser.parse_args()
    size = options.width, options.rows, options.length
    if options.one:
        print(json.dumps(measured(options.one, *size)))
        return
    found: list[dict[str, object]] = []
    for name in TECHNIQUES:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", name]
        for key in ("width", "rows", "length"):
            command += [f"--{key}", str(getattr(options, key))]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
        print(found[-1], flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
