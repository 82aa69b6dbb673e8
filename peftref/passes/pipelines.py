"""The passes in order."""

from __future__ import annotations

from peftref.ir.device import DEVICES, Device
from peftref.passes.apply_couplings import ApplyCouplings
from peftref.passes.base import Library, Pass
from peftref.passes.check_rules import CheckRules
from peftref.passes.choose_lowering import ChooseLowering
from peftref.passes.derive_properties import DeriveProperties
from peftref.passes.expand_functions import ExpandFunctions
from peftref.passes.freeze_start import FreezeStart
from peftref.passes.fuse import Fuse
from peftref.passes.resolve_sites import ResolveSites
from peftref.passes.simplify import Simplify
from peftref.passes.tie_parameters import TieParameters

__all__ = ["default_passes"]


def default_passes(
    library: Library,
    tokens: int = 1024,
    device: Device = DEVICES["cpu"],
    dtype: str = "float32",
) -> tuple[Pass, ...]:
    """Return the pipeline for ``tokens`` tokens a step, of a type, on a device."""
    return (
        ResolveSites(),
        ExpandFunctions(library),
        ApplyCouplings(library),
        TieParameters(),
        FreezeStart(),
        Simplify(),
        DeriveProperties(),
        CheckRules(),
        ChooseLowering(tokens, device, dtype),
        Fuse(),
    )
