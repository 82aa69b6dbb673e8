"""Pictures of rows: where they come from, and how they become what a backbone reads."""

# Image processors share no typed call.
# ruff: noqa: ANN401

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from transformers import AutoConfig

from peftref.backbone import hf
from peftref.errors import BackboneError, DataError

__all__ = ["SUFFIXES", "Picture", "is_picture", "load_processor", "picture_of", "pixels"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
PILLOW = "pictures need Pillow: pip install 'peftref[images]'"


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture, or its values.

    Attributes:
        digest: SHA-256 of the content: equal pictures are equal rows.
        path: file that holds it; it is read when a batch needs it.
        content: encoded bytes, or the values of one that has a ``shape``.
        shape: (height, width) or (height, width, 3) of values from 0 to 255.
    """

    digest: str
    path: Path | None = field(default=None, repr=False, compare=False)
    content: bytes | None = field(default=None, repr=False, compare=False)
    shape: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def opened(self) -> Any:
        """Return it as a Pillow image in RGB.

        Raises:
            DataError: it is damaged, or Pillow is missing.
        """
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise DataError(PILLOW) from error
        if self.shape:
            values = np.frombuffer(self.content or b"", np.uint8).reshape(self.shape)
            return Image.fromarray(values).convert("RGB")
        try:
            source = io.BytesIO(self.content) if self.content is not None else self.path
            with Image.open(cast("Any", source)) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.path or 'a picture'} cannot be read: {error}") from error


def is_picture(value: object) -> bool:
    """Whether a cell looks like a picture: a file's name, bytes, or rows of numbers."""
    if isinstance(value, str):
        return value.lower().endswith(SUFFIXES)
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    rows = isinstance(value, list) and bool(value) and isinstance(value[0], list)
    return isinstance(value, bytes) or rows or hasattr(value, "tobytes")


def picture_of(value: object, folder: Path, where: str) -> Picture:
    """Return the picture of a cell.

    Args:
        value: path, bytes, ``{"path": ..., "bytes": ...}`` as `datasets` keeps it, a Pillow image,
            or numbers from 0 to 255 as (height, width) or (height, width, 3).
        folder: what a relative path starts from.
        where: place of the row, for messages.

    Raises:
        DataError: it is none of these, or its file is missing.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Picture(hashlib.sha256(value).hexdigest(), None, value)
    if isinstance(value, str):
        path = folder / Path(value).expanduser()
        try:
            return Picture(hashlib.sha256(path.read_bytes()).hexdigest(), path)
        except OSError as error:
            raise DataError(f"{where}: no picture {str(path)!r} ({error.strerror})") from None
    return _of_values(value, where)


def _of_values(value: object, where: str) -> Picture:
    try:
        values = np.asarray(cast("Any", value), dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    fits = values.ndim == 2 or (values.ndim == 3 and values.shape[-1] == 3)
    if not fits or not ((values >= 0) & (values <= 255)).all():
        raise DataError(
            f"{where}: a picture is a file's name, encoded bytes, or numbers from 0 to 255 in "
            f"(height, width) or (height, width, 3), not {type(value).__name__} of shape "
            f"{values.shape}"
        )
    content = values.round().astype(np.uint8).tobytes()
    digest = hashlib.sha256(repr(values.shape).encode() + content).hexdigest()
    return Picture(digest, None, content, values.shape)


def pixels(pictures: Sequence[Picture], processor: Any) -> Tensor:
    """Return what the backbone reads, (B, channels, height, width)."""
    opened = [picture.opened() for picture in pictures]
    return processor(images=opened, return_tensors="pt")["pixel_values"]


def load_processor(source: str) -> Any:
    """Return the image processor of a checkpoint.

    A checkpoint without one gets that of ViT, at the size that its configuration names.

    Raises:
        BackboneError: it cannot be read, or the size is not known.
        DataError: Pillow is missing.
    """
    try:
        import PIL  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise DataError(PILLOW) from error
    with hf.quiet():
        from transformers import AutoImageProcessor, ViTImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError, ImportError) as error:
            folder = Path(source)
            if not folder.is_dir() or (folder / "preprocessor_config.json").is_file():
                first = str(error).strip().splitlines()[0]
                raise BackboneError(f"backbone {source!r} has no image processor: {first}") from (
                    error)
        size = getattr(AutoConfig.from_pretrained(source), "image_size", None)
        if not isinstance(size, int):
            raise BackboneError(
                f"backbone {source!r} names no size of pictures; give it a preprocessor_config.json"
            )
        return ViTImageProcessor(size={"height": size, "width": size})


def digits() -> list[tuple[int, object]]:
    """Return scikit-learn's hand-written digits as numbered rows; values 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    held = cast("Any", load_digits())
    images = np.rint(held.images * (255 / 16)).astype(int).tolist()
    return [
        (number, {"image": image, "label": str(label)})
        for number, (image, label) in enumerate(zip(images, held.target, strict=True), start=1)
    ]
