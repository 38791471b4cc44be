"""What the public calls give back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from flexattn_jax.models.vlm import Features, Memory


@dataclasses.dataclass(frozen=True)
class SelectionReport:
    """What high resolution a sample read.

    layers: decoder layers that read it.
    cells: (len(layers), C) bool, cells that the last prompt token read in each.
    overflow: (len(layers),) int, cells over the threshold that the capacity had no room for; where options were
      scored, of the last prompt token and all tokens of the options together.
    cells_read: cells projected at all, in all layers together, over the prompt and everything after it.
    """

    layers: tuple[int, ...]
    cells: np.ndarray
    overflow: np.ndarray
    cells_read: int


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer: its text, its ids (with the end-of-sequence token if it came), and what was read for it."""

    text: str
    token_ids: list[int]
    selection: SelectionReport | None


@dataclasses.dataclass(frozen=True)
class OptionScores:
    """Mean loss of each option of a question, lower is likelier, and what was read for them."""

    losses: list[float]
    selection: SelectionReport | None


@dataclasses.dataclass(frozen=True)
class EncodedPicture:
    """A picture that the tower and the connector have seen: takes the place of a picture in every call of its model.

    size: (width, height) in pixels, before padding.
    features: what the decoder reads, of a batch of one, on the device.
    owner: the model that made it, and that alone can read it.
    beginnings: what prompts that begin alike have left in the decoder, by their ids up to the picture; filled when
      questions are asked.
    """

    size: tuple[int, int]
    features: Features = dataclasses.field(repr=False)
    owner: Any = dataclasses.field(repr=False)
    beginnings: dict[tuple[int, ...], Memory] = dataclasses.field(default_factory=dict, repr=False)
