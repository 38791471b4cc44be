"""Which cases a table has, and what the user is told who writes an axis wrongly."""

import pytest
from costs.tables import config_file, settings

from flexattn_jax.config import ConfigError, preset
from flexattn_jax.costs.cases import Case, compiler_options, expand, model_config, read_settings
from flexattn_jax.costs.targets import GPUS, TPUS, environment, parse_target


@pytest.mark.parametrize("variant", sorted(config_file().VARIANTS))
def test_every_variant_of_the_config_file_is_a_table(variant):
    cases = expand(settings(variant))
    assert cases and len({case.name for case in cases}) == len(cases)


def test_the_default_is_the_scanned_7b_table_on_two_targets_with_some_unrolled_rows():
    cases = expand(settings())
    scanned = [case for case in cases if case.layers == "scanned"]
    unrolled = [case for case in cases if case.layers == "unrolled"]
    assert {case.target for case in cases} == {"cpu", "v5e:2x2"}
    assert {case.program for case in scanned} == {"prefill", "decode"}
    assert {case.system for case in unrolled} < {case.system for case in scanned}
    assert {case.system for case in scanned} == {"lowres", "flex:10%", "flex:25%", "flex:all", "dense"}
    assert all(settings().limit(case) == 60 for case in unrolled)


def test_axes_that_a_case_knows_nothing_of_make_no_second_row():
    cases = expand(
        settings(
            systems="lowres,flex:8,flex:all",
            programs="prefill,train",
            targets="cpu",
            layers="scanned",
            remat="none,full",
            rankings="cells,sort",
            zooms="2,3",
        )
    )
    count = lambda **want: sum(all(getattr(c, k) == v for k, v in want.items()) for c in cases)  # noqa: E731
    assert count(system="lowres", program="prefill") == 1
    assert count(system="lowres", program="train") == 2  # remat
    assert count(system="flex:8", program="prefill") == 4  # zoom x ranking
    assert count(system="flex:all", program="train") == 4  # zoom x remat: nothing is ranked
    checks = expand(settings(programs="matmul", systems="lowres,flex:8", targets="cpu", layers="scanned"))
    assert [case.program for case in checks] == ["matmul"]


def test_systems_are_overrides_of_a_preset():
    lowres = model_config(Case("lowres", "prefill", "cpu"))
    assert lowres.flexattention is None and lowres.image_size == 336 and lowres.dtype == "bfloat16"
    tenth = model_config(Case("flex:10%", "prefill", "cpu")).flexattention
    assert (tenth.selection, tenth.capacity, tenth.union_capacity) == ("top_k", 8, 8)
    assert model_config(Case("flex:25%", "prefill", "cpu")).flexattention.capacity == 20
    assert model_config(Case("flex:5", "prefill", "cpu")).flexattention.capacity == 5
    assert model_config(Case("flex:all", "prefill", "cpu")).flexattention.selector == "all"
    dense = model_config(Case("dense", "prefill", "cpu", zoom=2))
    assert dense.flexattention is None and (dense.dense.tiles, dense.image_size) == (2, 672)
    wide = model_config(Case("xattn", "prefill", "cpu")).crossattention
    assert (wide.width, wide.source, wide.tiles) == (4096, "connector", 3)
    fewer = model_config(Case("visionzip:64", "prefill", "cpu"))
    assert (fewer.reduction.method, fewer.num_slots, fewer.image_size) == ("visionzip", 64, 336)
    grouped = model_config(Case("vistog:64", "prefill", "cpu"))
    assert (grouped.grouping.groups, grouped.num_slots, grouped.image_size) == (64, 64, 336)
    assert grouped.flexattention is None and grouped.trains_in_tower
    mask = model_config(Case("flex:8", "prefill", "cpu", ranking="mask")).flexattention
    assert (mask.selection, mask.capacity) == ("threshold", None)


@pytest.mark.parametrize(("depth", "first"), [(4, 1), (8, 2), (16, 4), (32, 8)])
def test_a_shallower_model_reads_high_resolution_from_the_same_share_of_its_layers_on(depth, first):
    config = model_config(Case("flex:8", "prefill", "cpu", depth=depth))
    assert (config.decoder.num_layers, config.flexattention.first_layer) == (depth, first)


def test_zoom_changes_the_picture_and_not_the_sequence():
    config = model_config(Case("flex:8", "prefill", "cpu", zoom=4))
    assert config.image_size == 1344 and config.num_lowres_tokens == preset("7b").num_lowres_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": "flex"}, "systems has 'flex'"),
        ({"systems": "lowres:8"}, "systems has 'lowres:8'"),
        ({"systems": "flex:82"}, "a number from 1 to 81"),
        ({"systems": "flex:ten"}, "cells are a number from 1 to 81"),
        ({"systems": "fastv"}, "fastv:192"),
        ({"systems": "fastv:577"}, "tokens are a number from 1 to 576"),
        ({"systems": " "}, "systems is empty"),
        ({"unrolled_systems": "lowres,nosuch"}, "unrolled_systems has 'nosuch'"),
        ({"programs": "prefil"}, "programs has 'prefil'; known: prefill"),
        ({"targets": "v5litepod-16"}, "targets has 'v5litepod-16'; write cpu"),
        ({"targets": "v4:2x2"}, "targets has 'v4:2x2'"),
        ({"presets": "70b"}, "unknown preset '70b'"),
        ({"depths": "4,none"}, "depths has 'none'"),
        ({"depths": "9" * 5000}, "write whole numbers"),
        ({"systems": "flex:" + "9" * 5000}, "cells are a number from 1 to 81"),
        ({"targets": "v5e:2x" + "9" * 5000}, "a TPU with its topology"),
        ({"rankings": "best"}, "rankings has 'best'; known: cells"),
        ({"remat": "some"}, "remat has 'some'"),
        ({"options": "xla_flag"}, "options has 'xla_flag'; write compiler options as --xla_name=value"),
        ({"passes": 0}, "passes is 0"),
        ({"time_limit": 0.0}, "time_limit is 0.0"),
        ({"zooms": "100"}, "100"),
    ],
)
def test_a_wrong_axis_is_one_sentence(changes, message):
    if "zooms" in changes:  # a picture of any size can be described
        assert message in expand(settings(**changes))[-1].name
        return
    with pytest.raises(ConfigError) as error:
        expand(settings(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_setting_too_much_or_too_few_is_named():
    values = config_file().get_config().to_dict()
    with pytest.raises(ConfigError, match="speed"):
        read_settings(values | {"speed": 1})
    del values["passes"]
    with pytest.raises(ConfigError, match="passes"):
        read_settings(values)
    with pytest.raises(ValueError, match=":depth"):
        config_file().get_config("fast")


def test_compiler_options_are_an_axis():
    cases = expand(settings(programs="decode", systems="lowres", targets="cpu", layers="scanned", options=";--xla_a=1"))
    assert [compiler_options(case) for case in cases] == [{}, {"xla_a": "1"}]
    assert "--xla_a=1" in cases[1].name
    card = Case("lowres", "decode", "h100", options="--xla_b=true")  # XLA cannot try its kernels without the card
    assert compiler_options(card) == {"xla_gpu_enable_triton_gemm": "False", "xla_b": "True"}


def test_targets_are_names_with_a_shape():
    assert parse_target("v5e:4x8").shape == (4, 8)
    assert parse_target("v5p:2x2x1").chip is TPUS["v5p"]
    assert parse_target("h100").shape == (1,) and parse_target("a100:8").chip is GPUS["a100"]
    assert parse_target("cpu").runs_here and not parse_target("h100").runs_here
    assert environment(parse_target("v6e:1x1"))["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert environment(parse_target("attached")) == {}


@pytest.mark.parametrize(("kind", "hertz"), [("v4", 1.05e9), ("v5e", 1.5e9), ("v5p", 1.75e9), ("v6e", 1.75e9)])
def test_clocks_follow_from_the_peaks(kind, hertz):
    assert TPUS[kind].clock == pytest.approx(hertz, rel=0.01)
