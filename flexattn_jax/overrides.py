"""Settings of commands that change a checkpoint's own configuration."""

from __future__ import annotations

import types
import typing

from ml_collections import config_dict

from flexattn_jax.config import FlexAttentionConfig

_HINTS = typing.get_type_hints(FlexAttentionConfig)
_SELECTION = ("variant", "selector", "selection", "threshold", "ablation_share", "capacity", "union_capacity")
INFERENCE = ("enabled", "first_layer", *_SELECTION, "seed")
TRAINING = ("first_layer", *_SELECTION, "warmup")


def flexattention_overrides(names: typing.Sequence[str] = INFERENCE) -> config_dict.ConfigDict:
    """A table of FlexAttention's settings, each None until the user sets it: the checkpoint's own value stays.

    `FlexAttentionConfig` says what each of them means and which values it may have. "enabled" is False for the same
    weights at low resolution only.
    """
    return config_dict.ConfigDict({name: config_dict.placeholder(_kind(_HINTS[name])) for name in names})


def _kind(hint: typing.Any) -> type:
    """The type of a value that may also be None."""
    if isinstance(hint, types.UnionType):
        (hint,) = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return hint
