"""What a machine can do, as far as the choice between two ways to compute depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from peftref.errors import CompositionError, unknown_name

__all__ = ["DEVICES", "Device", "device_named"]

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Device:
    """A machine by its rates.

    Attributes:
        name: as given to ``--device``.
        rates: FLOP/s of large products, by type.
        bandwidth: bytes/s of a pass over a tensor that does not stay in a cache.
        cache: passes over tensors of at most so many bytes are not counted.
        unit: a product's inner extent is a multiple of this on matrix units; 1: there are none.
        kernels: whether one kernel may hold a product and what is added to it (Triton).
    """

    name: str
    rates: tuple[tuple[str, float], ...]
    bandwidth: float
    cache: int = 0
    unit: int = 1
    kernels: bool = False

    def rate(self, dtype: str) -> float:
        """FLOP/s in a type; of float32 where the type is not known."""
        rates = dict(self.rates)
        return rates.get(dtype, rates["float32"])

    def padded(self, rank: int) -> int:
        """The rank that a product really runs with."""
        return -(-rank // self.unit) * self.unit


def element_size(dtype: str) -> int:
    """Bytes of one number."""
    return _BYTES.get(dtype, 4)


DEVICES = {
    device.name: device
    for device in (
        # Two cores with AVX-512, measured; the ratio of rate to bandwidth is what matters.
        Device(
            "cpu",
            (("float64", 85e9), ("float32", 170e9), ("bfloat16", 400e9), ("float16", 170e9)),
            bandwidth=40e9,
            cache=2**20,
        ),
        Device(
            "h100",
            (("float64", 50e12), ("float32", 50e12), ("bfloat16", 790e12), ("float16", 790e12)),
            bandwidth=3.0e12,
            unit=16,
            kernels=True,
        ),
        Device(
            "a100",
            (("float64", 15e12), ("float32", 15e12), ("bfloat16", 250e12), ("float16", 250e12)),
            bandwidth=1.7e12,
            unit=16,
            kernels=True,
        ),
    )
}
"""Rates that large products and passes reach, not the peaks of data sheets."""


def device_named(name: str) -> Device:
    """Return the built-in device of that name, or the one that a full name such as torch's tells.

    Raises:
        CompositionError: no device is named so.
    """
    lowered = name.lower()
    if lowered in DEVICES:
        return DEVICES[lowered]
    for known, device in DEVICES.items():
        if known != "cpu" and known in lowered:
            return device
    raise CompositionError(unknown_name("device", name, list(DEVICES)))
