"""A model of the same interface as flexattn_jax.api.VLM that answers at once, for tests of what is around it."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

LAYERS = (2, 3, 4, 5)
CELL_GRID, GRID = 9, 72


@dataclasses.dataclass
class FakeVLM:
    """Losses and letters come from `answers` (question text in the prompt -> value), else the first option wins."""

    answers: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0  # a call
    selects: bool = True
    asked: list[str] = dataclasses.field(default_factory=list)
    calls: list[int] = dataclasses.field(default_factory=list)

    @property
    def config(self):
        return SimpleNamespace(flexattention=SimpleNamespace(cell_grid=CELL_GRID), highres_grid=GRID)

    def score_prompts(self, images, prompts, continuations):
        self._called(images, prompts)
        scores = []
        for prompt, options in zip(prompts, continuations, strict=True):
            given = self._given(prompt, [1.0 + k for k in range(len(options))])
            scores.append(SimpleNamespace(losses=given, selection=self._selection(prompt)))
        return scores

    def generate_prompts(self, images, prompts, max_new_tokens):
        self._called(images, prompts)
        return [
            SimpleNamespace(text=self._given(prompt, "A"), token_ids=[], selection=self._selection(prompt))
            for prompt in prompts
        ]

    def _called(self, images, prompts):
        assert len(images) == len(prompts)
        assert all(image.mode == "RGB" for image in images)
        self.calls.append(len(prompts))
        self.asked.extend(prompts)
        time.sleep(self.seconds)

    def _given(self, prompt, default):
        for text, value in self.answers.items():
            if text in prompt:
                if isinstance(value, Exception):
                    raise value
                return value
        return default

    def _selection(self, prompt):
        if not self.selects:
            return None
        rng = np.random.default_rng(int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16))
        rows, columns = np.divmod(np.arange(CELL_GRID**2), CELL_GRID)
        row, column = rng.uniform(2, 6, 2)
        distance = np.hypot(rows - row, columns - column)
        cells = np.stack([distance + rng.normal(0, 0.9, distance.shape) < 1.2 + 0.4 * k for k in range(len(LAYERS))])
        return SimpleNamespace(layers=LAYERS, cells=cells, overflow=np.arange(len(LAYERS)), cells_read=int(cells.sum()))
