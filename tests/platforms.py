"""Attention as other platforms run it, on CPU."""

import jax

from flexattn_jax.ops import blockwise


def attend_as(platform, monkeypatch):
    """From here on programs are traced as for "tpu" or "default", in blocks so small that short sequences have some."""

    def choose(*operands, default, **ways):
        return ways.get(platform, default)(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    for name, value in {"ROWS_AT_ONCE": 16, "LANES": 8, "FEW_LOGITS": 1, "LOGITS_AT_ONCE": 256}.items():
        monkeypatch.setattr(blockwise, name, value)
