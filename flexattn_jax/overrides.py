"""Settings of commands that change a checkpoint's own configuration."""

from __future__ import annotations

import types
import typing

from ml_collections import config_dict

from flexattn_jax.config import OPENED, FlexAttentionConfig

_CELLS = ("cell_grid", "selection", "threshold", "ablation_share", "revisit", "capacity", "union_capacity")
_SELECTION = ("variant", "selector", *_CELLS)
INFERENCE = ("enabled", "first_layer", *_SELECTION, "seed")
TRAINING = ("first_layer", *_SELECTION, "warmup")


def flexattention_overrides(names: typing.Sequence[str] = INFERENCE) -> config_dict.ConfigDict:
    """A table of FlexAttention's settings, each None until the user sets it: the checkpoint's own value stays.

    `FlexAttentionConfig` says what each of them means and which values it may have. "enabled" is False for the same
    weights at low resolution only.
    """
    return _table(FlexAttentionConfig, names)


def system_overrides(names: typing.Sequence[str] = INFERENCE) -> config_dict.ConfigDict:
    """Tables of the settings of every way to read a picture, each setting None until the user sets it.

    A setting of any of these but FlexAttention turns that on; docs/systems.md says what goes together. Of
    FlexAttention's settings the table has `names`.
    """
    tables = {name: _table(kind, tuple(typing.get_type_hints(kind))) for name, kind in OPENED.items()}
    sizes = {"image_size": config_dict.placeholder(int), "decoder": {"max_positions": config_dict.placeholder(int)}}
    return config_dict.ConfigDict({"flexattention": flexattention_overrides(names)} | tables | sizes)


def _table(kind: type, names: typing.Sequence[str]) -> config_dict.ConfigDict:
    hints = typing.get_type_hints(kind)
    return config_dict.ConfigDict({name: config_dict.placeholder(_kind(hints[name])) for name in names})


def _kind(hint: typing.Any) -> type:
    """The type of a value that may also be None."""
    if isinstance(hint, types.UnionType):
        (hint,) = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return typing.get_origin(hint) or hint
