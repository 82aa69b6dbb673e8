"""One of several classes for a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftref.training.columns import Columns, ask, infer_image, need_label
from peftref.training.encode import Collate, Encoded, Row
from peftref.training.example import Example
from peftref.training.pictures import picture_of, pixels
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings, Pooling
from peftref.training.tasks.base import Named, Place, Setup, tasks
from peftref.training.tasks.classification import Classified

__all__ = ["ImageClassification"]


@tasks.register("image_classification")
class ImageClassification(Classified):
    """One of several classes for a picture, which is read when a batch needs it."""

    name = "image_classification"
    head = "image_classification"
    meanings = ("image", "label")
    sees_pictures = True

    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Find picture and label."""
        image = infer_image(table, data)
        if image is None:
            raise ask(table, "image")
        return Columns(self.name, label=need_label(table, data), image=image)

    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Find the picture."""
        picture = picture_of(row.get(columns.image or ""), Path(place.folder), place.name)
        if names is None or columns.label is None:
            return Example(picture=picture)
        label = self.label(row.get(columns.label), columns, names, place)
        return Example(label=label, picture=picture)

    def shape(
        self, model: PreTrainedModel, pooling: Pooling, source: str, *, trained_pooler: bool
    ) -> tuple[Pooling, tuple[str, ...]]:
        """A model of pictures pools as it does."""
        return "model", ()

    def encode(self, examples: Sequence[Example], setup: Setup) -> Encoded:
        """Keep the pictures as they are: as numbers, those of an epoch fill no memory."""
        rows = tuple({"picture": each.picture} | self.labels(each, setup) for each in examples)
        return Encoded(rows, 0, (1,) * len(rows))

    def collator(self, setup: Setup) -> Collate:
        """Read, resize and normalise the pictures of a batch."""
        def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
            batch = {"pixel_values": pixels([row["picture"] for row in rows], setup.processor)}
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return collate
