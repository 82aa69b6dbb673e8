"""One row of data by meaning, whatever its columns were called."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from peftref.training.pictures import Picture

__all__ = ["Example", "Label"]

# A class number, a quantity, a text to be written, or several class numbers.
Label = int | float | str | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Example:
    """What a model is shown, and what it should say.

    Attributes:
        text: the text, or what choices belong to.
        pair: a second text.
        label: None where nothing is to be learnt or nothing is known.
        words: a text that is already cut, where each word has a label.
        choices: the texts of which one is right.
        picture: what is shown instead of a text.
    """

    text: str = ""
    pair: str | None = None
    label: Label = None
    words: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    picture: Picture | None = None

    @property
    def key(self) -> Hashable:
        """What makes two rows the same input."""
        return self.text, self.pair, self.words, self.choices, self.picture
