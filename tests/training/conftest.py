"""A tiny checkpoint and a small data set in LLaVA's format."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, random_params
from PIL import Image

from flexattn_jax.checkpoints.store import save_model
from flexattn_jax.config import override, preset
from flexattn_jax.inputs.tokenizer import load_tokenizer

TOKENIZER = FIXTURES / "inputs" / "huggingface"
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 210), "yellow": (220, 210, 40)}


@pytest.fixture(scope="session")
def tokenizer():
    """420 entries, of the same kind as LLaMA's."""
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def small_config(tokenizer):
    """The tiny preset with three layers, for quick compiles."""
    changes = {"decoder.vocab_size": tokenizer.vocab_size, "decoder.num_layers": 3, "flexattention.threshold": 60.0}
    return override(preset("tiny"), changes)


@pytest.fixture(scope="session")
def checkpoint(small_config, tmp_path_factory) -> Path:
    """A native checkpoint of random parameters."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    params = random_params(small_config, seed=5)
    save_model(folder, small_config, params, like=TOKENIZER)
    return folder


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory) -> Path:
    """conversations.json and pictures/: 30 usable conversations, 6 of them about text, one with a torn picture."""
    root = tmp_path_factory.mktemp("data")
    (root / "pictures" / "set").mkdir(parents=True)
    records = []
    rng = np.random.default_rng(0)
    for i in range(30):
        name, colour = list(COLOURS.items())[i % 4]
        turns = [{"from": "human", "value": "<image>\nWhat is the colour?"}, {"from": "gpt", "value": name}]
        if i % 3 == 0:
            turns += [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "yes" if i % 4 == 0 else "no"}]
        record = {"id": f"id{i}", "image": f"set/{i}.jpg", "conversations": turns}
        if i % 5 == 4:
            del record["image"]
            turns[0]["value"] = "Name a colour of the sky in a few words, please."
        else:
            noise = rng.integers(0, 40, (24, 30 + i % 7, 3))
            picture = Image.fromarray((noise + np.array(colour) * 0.8).astype(np.uint8))
            picture.save(root / "pictures" / "set" / (f"{i}.png" if i % 6 == 1 else f"{i}.jpg"))
        records.append(record)
    torn = root / "pictures" / "set" / "10.jpg"
    torn.write_bytes(torn.read_bytes()[:200])
    records.append({"id": "gone", "image": "set/gone.jpg", "conversations": records[0]["conversations"]})
    (root / "conversations.json").write_text(json.dumps(records))
    return root


@pytest.fixture
def settings_of(checkpoint, llava_data):
    """Of a stage of configs/train_llava.py, for the data set above."""
    file = Path(__file__).parents[2] / "configs" / "train_llava.py"
    spec = importlib.util.spec_from_file_location("train_llava", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(stage):
        config = module.get_config(stage)
        config.start.checkpoint = str(checkpoint)
        config.data.update(conversations=str(llava_data / "conversations.json"), pictures=str(llava_data / "pictures"))
        config.data.update(max_length=160, text_lengths=(128,), answer_rows=(16,), eval_samples=4, window=2)
        config.optimizer.learning_rate = 3e-3
        config.batch_size, config.epochs, config.seed = 4, 2.0, 1
        config.model.remat = "none"
        config.loop.update(log_every=1, eval_every=6, save_every=3, threads=2, read_ahead=2, pictures=1)
        return config.to_dict()

    return make


@pytest.fixture
def settings(settings_of):
    """Of instruction tuning."""
    return settings_of("instruct")


@pytest.fixture
def copied(llava_data, tmp_path) -> Path:
    """A copy of the data to spoil."""
    return Path(shutil.copytree(llava_data, tmp_path / "data"))
