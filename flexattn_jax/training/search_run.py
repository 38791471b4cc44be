"""Training on vsearch: the tower first, then the model that answers; what train.py calls for configs/train_mini.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexattn_jax.config import ConfigError, from_dict
from flexattn_jax.inputs.datasets.vsearch import PRESETS, content_name, default_data_dir, load_vsearch
from flexattn_jax.inputs.tokenizer import Tokenizer
from flexattn_jax.inputs.word_tokenizer import write_word_tokenizer
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.run import Data, Task, run_training, vlm_task
from flexattn_jax.training.search import SearchSource
from flexattn_jax.training.start import Start
from flexattn_jax.training.tower import TowerConfig, TowerSource, probe_params, tower_loss
from flexattn_jax.training.views import VIEWS, joined, keep_views

STAGES = ("tower", "answers")


@dataclasses.dataclass(frozen=True)
class SearchData:
    """Which pictures are learned from."""

    presets: tuple[str, ...] = ("standard", "crowded")  # of vsearch
    pictures: int = 8000  # of each, of the split `train`
    questions: bool = True  # the data set's
    captions: int = 0  # of a picture's colours, beside its questions; stage "answers"
    columns: int = 0  # captions of where things are; stage "answers"
    sides: int = 0  # captions of where things are relative to each other; stage "answers"
    seed: int = 0
    data_dir: str = ""  # where they are drawn to; "": the user's data folder
    grounding: float = 0.0  # weight of the loss that maps fall on what is asked about; stage "answers"
    keep_views: bool = True  # see every picture once and keep what the frozen tower saw; stage "answers"

    def __post_init__(self):
        unknown = [name for name in self.presets if name not in PRESETS]
        if unknown or not self.presets or len(set(self.presets)) != len(self.presets):
            raise ConfigError(f"data.presets is {self.presets}; name some of {', '.join(PRESETS)}, each once")
        if not 0 <= self.grounding < math.inf:
            raise ConfigError(f"data.grounding is {self.grounding}; it must be a number from 0 on")
        texts = {name: getattr(self, name) for name in ("captions", "columns", "sides")}
        if min(texts.values()) < 0 or not (self.questions or any(texts.values())):
            told = ", ".join(f"data.{name} {count}" for name, count in texts.items())
            raise ConfigError(f"{told}: none can be below 0, and where no question is learned one must be above")


def run_search(settings: Mapping[str, Any], workdir: str | Path) -> Path:
    """Trains on vsearch; `settings` are those of configs/train_mini.py."""
    stage, names = settings["stage"], {field.name for field in dataclasses.fields(SearchData)}
    if stage not in STAGES:
        raise ConfigError(f"stage is {stage!r}; it must be one of {', '.join(STAGES)}")
    data, start = dict(settings["data"]), dict(settings["start"])
    own = from_dict({name: data.pop(name) for name in names & data.keys()}, SearchData, "data.")
    tower = from_dict(settings["tower"], TowerConfig, "tower.")
    _check_start(stage, start)
    settings = {name: v for name, v in settings.items() if name not in ("stage", "tower")}
    settings |= {"data": data, "start": start}
    folder = Path(own.data_dir).expanduser() if own.data_dir else default_data_dir()
    if not settings["start"]["checkpoint"] and not settings["start"]["tokenizer"]:
        settings["start"]["tokenizer"] = str(Path(workdir) / "tokenizer")
        if not (Path(settings["start"]["tokenizer"]) / "tokenizer.json").is_file():
            write_word_tokenizer(settings["start"]["tokenizer"])

    def make_data(tokenizer: Tokenizer, start: Start, _: Path) -> Data:
        train, held_out = [], []
        kept = stage == "answers" and own.keep_views
        vision = start.params()["vision"] if kept else None
        for sources, split, pictures in ((train, "train", own.pictures), (held_out, "validation", None)):
            for name in own.presets:
                rows = load_vsearch(folder, name, split, own.seed, pictures)
                digest = content_name(name, split, own.seed, len(rows))
                if stage == "tower":
                    most = max(PRESETS[preset].num_objects[1] for preset in own.presets)
                    sources.append(TowerSource(rows, start.config, most, digest))
                else:
                    texts = own.captions, own.columns, own.sides, own.questions
                    source = SearchSource(rows, tokenizer, start.config, digest, *texts)
                    if sources is train and kept:
                        source = keep_views(source, digest, start.config, vision, folder / VIEWS)
                    sources.append(source)
        return Data(joined(train), joined(held_out))

    def make_task(model: VLM) -> Task:
        if stage == "answers":
            if own.grounding and not model.config.reads_highres:
                raise ConfigError(
                    f"data.grounding is {own.grounding}, but this model has no maps that select; set it to 0, or "
                    "model.flexattention.enabled to True"
                )
            return vlm_task(model, own.grounding)
        return Task(tower_loss(model, tower), lambda seed: probe_params(model.config, seed), trains_tower=True)

    also = {"stage": stage, "data": dataclasses.asdict(own), "tower": dataclasses.asdict(tower)}
    del also["data"]["data_dir"]
    return run_training(settings, workdir, make_data, make_task, also)


def _check_start(stage: str, start: Mapping[str, Any]) -> None:
    """Raises ConfigError where what stage "answers" begins with is missing: which command makes it."""
    checkpoint = start["checkpoint"]
    if stage == "tower" or (Path(checkpoint).exists() if checkpoint else start["preset"]):
        return
    missing = f"{checkpoint} does not exist" if checkpoint else "--config.start.checkpoint is not given"
    raise ConfigError(
        f"{missing}; this stage begins with DIR/model of the one before it, see configs/train_mini.py: "
        "`python train.py --config=configs/train_mini.py:tower --workdir=DIR` makes the first, and `python "
        "tools/mini_study.py --out=DIR --arms=flex --train` all that there are"
    )
