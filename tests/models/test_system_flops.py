"""Operations counted at the 7B shape, against figures of the FlexAttention paper and of arithmetic by hand."""

import pytest

from flexattn_jax.config import override, preset
from flexattn_jax.models.flops import decoder_flops, grouping_flops, prefill_flops, tower_flops

LLAVA = override(preset("7b"), {"flexattention": None, "image_size": 336})
HD_448 = override(LLAVA, {"dense.tiles": 2, "image_size": 448})
HD_1008 = override(LLAVA, {"dense.tiles": 3, "image_size": 1008})
XATTN = override(LLAVA, {"image_size": 1008, "crossattention": {"width": 4096, "source": "connector"}})
TERA = 1e12


def test_the_decoder_behind_576_and_5760_visual_tokens():
    assert decoder_flops(LLAVA, 576 + 64) / TERA == pytest.approx(8.5, rel=0.02)
    assert decoder_flops(HD_1008, 5760 + 64) / TERA == pytest.approx(93.2, rel=0.02)


def test_a_336_pixel_tile_of_clip():
    assert tower_flops(LLAVA) / TERA == pytest.approx(0.38 * 23 / 24, rel=0.02)


@pytest.mark.parametrize(("config", "published"), [(LLAVA, 9.0), (HD_448, 24.5), (XATTN, 26.7)])
def test_table_5_of_the_paper_is_a_prompt_of_60_tokens(config, published):
    assert prefill_flops(config, 60) / TERA == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(("share", "published"), [(0.1, 13.4), (0.5, 17.1), (1.0, 21.8)])
def test_flexattention_as_released_multiplies_all_rows_with_all_selected_tokens(share, published):
    config = preset("7b")
    cells, rows = share * 81 * 23, 636
    assert prefill_flops(config, 60, cells, rows * cells) / TERA == pytest.approx(published, rel=0.05)
    # Only the last row needs them.
    saved = prefill_flops(config, 60, cells, rows * cells) - prefill_flops(config, 60, cells, cells)
    assert saved == pytest.approx(4 * 635 * share * 5184 * 4096 * 23)


def test_visual_tokens_of_vistog_by_hand():
    vistog = override(LLAVA, {"grouping.groups": 64})
    assert decoder_flops(vistog, 64 + 64) / TERA == pytest.approx(1.7, rel=0.02)
    forward, _ = grouping_flops(vistog)
    block = 2 * 64 * (4 * 1024 * 1024 + 2 * 1024 * 4096) + 4 * 64 * (577 + 64) * 1024
    assert forward == 23 * block + 4 * (64 + 576) * 1024 * 1024 + 4 * 64 * 576 * 1024
    assert grouping_flops(LLAVA) == (0, 0)


def test_cross_attention_by_hand():
    layer = 4 * 636 * 4096 * 4096 + 4 * 5184 * 4096 * 4096 + 4 * 636 * 5184 * 4096
    assert decoder_flops(XATTN, 636) - decoder_flops(LLAVA, 636) == pytest.approx(32 * layer)


def test_dropped_tokens_are_counted_in_the_layers_that_still_have_them():
    fastv = override(LLAVA, {"reduction.tokens": 64})
    by_hand = (2 * decoder_flops(LLAVA, 640) + 30 * decoder_flops(LLAVA, 128)) / 32
    assert decoder_flops(fastv, 640) == pytest.approx(by_hand)
    fewer = override(LLAVA, {"reduction": {"method": "tome", "tokens": 64}})
    assert decoder_flops(fewer, 64 + 64) / TERA == pytest.approx(1.7, rel=0.02)
