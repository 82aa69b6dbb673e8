"""Time to put LoRA on all linears of a 32-layer Llama, and to plan it for one of 70 billion.

    python -m benchmarks.attach --json benchmarks/results/attach.json

The 32-layer Llama is 64 wide, so that what is measured is the work a module and not the drawing of
numbers; the large one lies on the meta device. Processor time, the least of some calls.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaModel

import peftref

ALL = "site='{attention,ffn}.*'"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(layers: int, width: int, inner: int, heads: int) -> LlamaModel:
    """Return a Llama with a quarter of the heads for keys."""
    return LlamaModel(LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=heads // 4, vocab_size=1000,
    ))  # fmt: skip


def least(run: Callable[[LlamaModel], object], make: Callable[[], LlamaModel], calls: int) -> float:
    """Return the least processor time of ``run`` over fresh models."""
    best = float("inf")
    for _ in range(calls):
        model = make()
        begun = time.process_time()
        run(model)
        best = min(best, time.process_time() - begun)
    return best


def by_peft(model: LlamaModel) -> object:
    """Wrap with PEFT's LoRA."""
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=TARGETS))


def measured(calls: int) -> dict[str, float]:
    """Return seconds by what was done."""

    def small() -> LlamaModel:
        return llama(32, 64, 192, 4)

    def large() -> LlamaModel:
        with torch.device("meta"):
            return llama(80, 8192, 28672, 64)

    peftref.compile("lora", small())  # reads the catalogue and the families, once a process
    return {
        "peftref.attach, 32 layers": least(
            lambda model: peftref.attach(model, f"lora(rank=16, {ALL})"), small, calls),
        "peft.get_peft_model, 32 layers": least(by_peft, small, calls),
        "peftref.compile, 80 layers, 70B on meta": least(
            lambda model: peftref.compile(f"lora(rank=16, {ALL})", model), large, 1),
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description="time to compile and to attach")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {name: round(seconds, 3) for name, seconds in measured(given.calls).items()}
    for name, seconds in found.items():
        print(f"{seconds:8.3f} s  {name}")
    if given.json is not None:
        versions = {name: version(name) for name in ("peftref", "peft", "torch", "transformers")}
        told = {"versions": versions, "seconds": found}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
