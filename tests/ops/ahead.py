"""Compile every kernel for GPUs that need not be there, and print what each takes.

    python -m tests.ops.ahead           all of them
    python -m tests.ops.ahead --first   one form of each kernel

A kernel must fit the shared memory, spill no register and use no stack. That it compiles says
nothing of its numbers, which the interpreted tests see, nor of its speed.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import peftref.ops
from peftref.ops.tiles import Variant

__all__ = ["SHARED_KIB", "Usage", "all_variants", "compile_variant"]

SHARED_KIB = {80: 163, 90: 227}
"""Shared memory that one block may have."""


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    name: str
    architecture: int
    registers: int
    stack: int
    spilled: int
    shared_kib: float

    @property
    def fits(self) -> bool:
        """Whether it runs as it is meant to."""
        held = self.shared_kib <= SHARED_KIB[self.architecture]
        return held and self.stack == 0 and self.spilled == 0


def all_variants() -> Iterator[Variant]:
    """The forms of all ops' kernels."""
    for package in pkgutil.iter_modules(peftref.ops.__path__):
        folder = Path(peftref.ops.__path__[0], package.name)
        if (folder / "triton.py").exists():
            module = importlib.import_module(f"peftref.ops.{package.name}.triton")
            yield from module.variants()


def compile_variant(variant: Variant, architecture: int) -> Usage:
    """Compile for one compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    aligned = [
        i for i, n in enumerate(names)
        if n not in variant.unaligned and signature[n].startswith(("*", "i"))
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={n: v for n, v in variant.constants.items() if n in names},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        name = "sm_90a" if architecture == 90 else f"sm_{architecture}"
        # The assembler that Triton itself uses: others reject its dialect.
        command = [get_ptxas(architecture).path, "-v", "--gpu-name", name, file.name]
        said = subprocess.run(
            [*command, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    return Usage(
        variant.name,
        architecture,
        registers=_number(r"Used (\d+) registers", said),
        stack=_number(r"(\d+) bytes stack frame", said),
        spilled=_number(r"(\d+) bytes spill stores", said),
        shared_kib=kernel.metadata.shared / 1024,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler did not say {pattern!r}:\n{text}")
    return int(found[1])


def _chosen(arguments: list[str]) -> Iterator[tuple[Variant, int]]:
    seen: set[object] = set()
    for variant in all_variants():
        if "--first" in arguments and variant.kernel in seen:
            continue
        seen.add(variant.kernel)
        newest = variant.architectures[-1:]
        for architecture in newest if "--first" in arguments else variant.architectures:
            yield variant, architecture


def main(arguments: list[str]) -> int:
    """Print the table; the exit code says whether all fit."""
    print(f"{'kernel':56} sm regs stack spilled shared KiB")
    failed = 0
    for variant, architecture in _chosen(arguments):
        u = compile_variant(variant, architecture)
        failed += not u.fits
        note = "" if u.fits else "  <- does not fit"
        print(
            f"{u.name:56} {u.architecture} {u.registers:4} {u.stack:5} {u.spilled:7} "
            f"{u.shared_kib:10.1f}{note}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
