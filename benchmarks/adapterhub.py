"""Adapters of AdapterHub, by an interpreter of their own: they need another transformers.

    python adapterhub.py BACKBONE ROUNDS THREADS CLOCK TECHNIQUE...

prints one line of JSON: technique -> (ratio to its own frozen step, saved MiB, peak MiB).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adapters
import torch

from benchmarks.backbones import build, of_shared_weights
from benchmarks.measure import Contestant, measure

RANK, BOTTLENECK = 16, 48


def configurations(width: int) -> dict[str, adapters.AdapterConfig]:
    """The techniques that it has in the form that is compared."""
    reduction = width / BOTTLENECK
    parallel = adapters.ParBnConfig(reduction_factor=reduction, scaling=4.0)
    return {
        "lora q,v": adapters.LoRAConfig(r=RANK, alpha=RANK),
        "ia3": adapters.IA3Config(),
        "prefix 20": adapters.PrefixTuningConfig(prefix_length=20, flat=True),
        "bottleneck 48": adapters.DoubleSeqBnConfig(reduction_factor=reduction),
        "parallel adapter 48": parallel,
        "mam": adapters.ConfigUnion(
            adapters.PrefixTuningConfig(prefix_length=20, flat=True), parallel
        ),
    }


def main() -> None:
    backbone, rounds, threads, clock, *techniques = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model, inputs = build(backbone, "cpu", torch.float32)
    bare = of_shared_weights(model)
    bare.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.requires_grad_()
    )
    contestants = {"frozen": Contestant(bare.train(), inputs, None)}
    known = configurations(model.config.hidden_size)
    for technique in techniques:
        if technique not in known:
            continue
        own = of_shared_weights(model)
        adapters.init(own)
        own.add_adapter("benchmark", config=known[technique])
        own.train_adapter("benchmark")
        trained = [p for p in own.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        contestants[technique] = Contestant(own.train(), inputs, optimiser)
    found = measure(contestants, int(rounds), clock)
    print(json.dumps({k: (m.ratio, m.saved_mib, m.peak_mib) for k, m in found.items()}))


if __name__ == "__main__":
    main()
