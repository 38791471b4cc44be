"""A small folder in V* Bench's layout."""

import json

import numpy as np
import pytest
from PIL import Image

COLOURS = ("red", "blue", "green", "white")


def make_data(folder, count=5):
    """`count` questions a split: 4 options for attributes, 2 for positions; pictures of different shapes."""
    for split, options in (("direct_attributes", 4), ("relative_position", 2)):
        (folder / split).mkdir(parents=True)
        for k in range(count):
            rng = np.random.default_rng(k)
            size = [(40, 30), (30, 40), (32, 32)][k % 3]
            Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / split / f"q{k}.png")
            fields = {
                "question": f"What about {split} number {k}?",
                "options": [f"Thing {k} is {colour}." for colour in COLOURS[:options]],
                "target_object": ["thing"],
                "bbox": [[3, 4, 10, 8]],
            }
            (folder / split / f"q{k}.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def data_dir(tmp_path):
    return make_data(tmp_path / "data")
