"""Which systems `configs/compare.py` puts beside each other: rows of its tables, by preset. Only data.

A row is a trained model, named by its arm, and what is changed in its configuration. Rows of one family are one method
at several sizes: the chart joins them by a line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexattn_jax.config import preset
from flexattn_jax.files import packaged

TRAINING_FREE = {
    "fastv": "FastV",
    "pyramiddrop": "PyramidDrop",
    "visionzip": "VisionZip",
    "tome": "ToMe-style merging",
    "random": "random tokens",
    "downsample": "down-sampling",
}


@dataclasses.dataclass(frozen=True)
class System:
    """One row.

    title: as printed.
    family: of rows that are one method.
    arm: of the model, see `Comparison.recipes`.
    overrides: dotted settings of its configuration.
    size: what tells it from its family's others, as the chart writes beside its point; "": nothing.
    """

    title: str
    family: str
    arm: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    systems: by name, in the table's order.
    recipes: the command that makes an arm's model; {models}, {seed} and {folder} (of the arm) are filled in.
    packaged: models that are read where none are given; None: there are none.
    """

    systems: Mapping[str, System]
    recipes: Mapping[str, str]
    packaged: Path | None = None


def _reduced(method: str, arm: str, tokens: int, of: str = "") -> dict[str, System]:
    title = f"{TRAINING_FREE[method]}, {tokens} tokens" + (f" of {of}" if of else "")
    family = TRAINING_FREE[method] + (f" of {of}" if of else "")
    settings = {"reduction.method": method, "reduction.tokens": tokens}
    name = f"{method}{f'_{arm}' if of else ''}_{tokens}"
    return {name: System(title, family, arm, settings, str(tokens))}


def _flex(name: str, title: str, size: str = "", **settings: Any) -> dict[str, System]:
    family = "FlexAttention" if size or not settings else title
    return {name: System(title, family, "flex", {f"flexattention.{k}": v for k, v in settings.items()}, size)}


def _cells(count: int) -> dict[str, System]:
    return _flex(f"flex_{count}", f"FlexAttention, {count} cells a layer", f"{count} cells", capacity=count)


# Read with the trained FlexAttention's weights.
_SELECTORS = {
    **_flex("flex_random", "FlexAttention, random cells in the test", selector="random"),
    **_flex("flex_center", "FlexAttention, central cells in the test", selector="center"),
    **_flex("flex_every", "FlexAttention, every cell in the test", selector="all"),
    **_flex("flex_again", "FlexAttention, cells read again in the test", revisit=True),
    **_flex("flex_paper", "FlexAttention, variant `paper`", variant="paper"),
}

_MINI_RECIPE = "python tools/mini_study.py --out={models} --arms={arm} --seeds={seed} --train"
_MINI_ARMS = ("twin", "dense", "xattn", "vistog", "flex", "released", "all", "random")

_KEPT = f"{preset('mini').flexattention.capacity} cells"

_MINI = {
    "lowres": System("LLaVA-1.5, low resolution alone", "LLaVA-1.5", "twin"),
    "dense": System("LLaVA-1.5-HD, every token in the sequence", "LLaVA-1.5-HD", "dense"),
    "xattn": System("LLaVA-XAttn, cross-attention in every layer", "LLaVA-XAttn", "xattn"),
    "vistog": System("VisToG, 16 tokens", "VisToG", "vistog"),
    **_flex("flex", "FlexAttention", _KEPT),
    "released": System("FlexAttention, cells may be read again", "FlexAttention, as released", "released"),
    "all": System("FlexAttention, trained with every cell", "FlexAttention, every cell", "all"),
    "random": System("FlexAttention, trained with random cells", "FlexAttention, random cells", "random"),
    **_cells(2),
    **_cells(8),
    **{
        name: system
        for method in TRAINING_FREE
        if method != "visionzip"  # ranks by a class token, which this tower has not
        for tokens in (32, 16, 8)
        for name, system in _reduced(method, "twin", tokens).items()
    },
    **{
        name: system
        for method in ("fastv", "pyramiddrop")
        for tokens in (512, 256, 128)
        for name, system in _reduced(method, "dense", tokens, "HD").items()
    },
}

_MINI_ABLATION = {
    "lowres": _MINI["lowres"],
    "flex": _MINI["flex"],
    **{name: system for count in (1, 2, 8, 16, 24) for name, system in _cells(count).items()},
    **_SELECTORS,
    **_flex("flex_grid_3", "FlexAttention, 3 x 3 cells", cell_grid=3, capacity=1),  # as many tokens
    **_flex("flex_from_2", "FlexAttention, first layer 2", first_layer=2),
    **_flex("flex_from_3", "FlexAttention, first layer 3", first_layer=3),
}

_IMPORT = "python -m flexattn_jax.checkpoints.import_weights --source {source} --out {{folder}}"
_TRAIN = (
    "python train.py --config=configs/train_llava.py{stage} --config.start.checkpoint={{models}}/{before} "
    "--config.start.read_highres=False --config.data.conversations=FILE --config.data.pictures=DIR {settings}"
    "--workdir={{folder}}"
)


def _trained(settings: Mapping[str, Any], stage: str = "", before: str = "llava") -> str:
    text = "".join(f"--config.{key}={value} " for key, value in settings.items())
    return _TRAIN.format(stage=stage, before=before, settings=text)


_CROSS = {
    "model.image_size": 1008,
    "model.crossattention.tiles": 3,
    "optimizer.trainable": "connector,decoder,highres",
}
_HD = {"model.image_size": 448, "model.dense.tiles": 2, "data.max_length": 3072}
_HD_1008 = {
    **{"model.image_size": 1008, "model.dense.tiles": 3, "model.decoder.max_positions": 8192},
    **{"data.max_length": 7296, "start.dtype": "bfloat16"},
}

_LARGE = {
    "llava": System("LLaVA-1.5, 336 px", "LLaVA-1.5", "llava"),
    "hd_448": System("LLaVA-1.5-HD, 448 px", "LLaVA-1.5-HD", "hd_448", size="448 px"),
    "hd_1008": System("LLaVA-1.5-HD, 1008 px", "LLaVA-1.5-HD", "hd_1008", size="1008 px"),
    "cogagent": System("CogAgent's cross-attention, 1008 px", "CogAgent", "cogagent"),
    "xattn": System("LLaVA-XAttn, 1008 px", "LLaVA-XAttn", "xattn"),
    **{f"vistog_{n}": System(f"VisToG, {n} tokens", "VisToG", f"vistog_{n}", size=str(n)) for n in (64, 144, 256)},
    **_flex("flex", "FlexAttention, 1008 px"),
    **_SELECTORS,
    **{
        name: system
        for method in TRAINING_FREE
        for tokens in (192, 128, 64)
        for name, system in _reduced(method, "llava", tokens).items()
    },
}
_LARGE_RECIPES = {
    "llava": _IMPORT.format(source="LLAVA --vision_tower CLIP"),
    "flex": _IMPORT.format(source="FLEXATTN"),
    "hd_448": _trained(_HD),
    "hd_1008": _trained(_HD_1008),
    "cogagent": _trained(_CROSS),
    "xattn": _trained(_CROSS | {"model.crossattention.width": 4096, "model.crossattention.source": "connector"}),
    **{
        f"vistog_{n}": _trained({"model.grouping.groups": n}, ":vistog", f"vistog_{n}_align/model")
        for n in (64, 144, 256)
    },
}

_MINI_RECIPES = {arm: _MINI_RECIPE.replace("{arm}", arm) for arm in _MINI_ARMS}

COMPARISONS = {
    "mini": Comparison(_MINI, _MINI_RECIPES, packaged("mini")),
    "mini,ablation": Comparison(_MINI_ABLATION, _MINI_RECIPES, packaged("mini")),
    "7b": Comparison(_LARGE, _LARGE_RECIPES),
}
