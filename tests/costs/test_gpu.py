"""Programs compiled for an H100 by JAX's CUDA plugin, without a GPU."""

import dataclasses

import pytest

from flexattn_jax.costs.cases import Case
from flexattn_jax.costs.lab import run_measurement
from flexattn_jax.costs.targets import MissingCompiler, check_installed, parse_target


def _is_missing() -> bool:
    try:
        check_installed(parse_target("h100"))
    except MissingCompiler:
        return True
    return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_is_missing(), reason='needs the CUDA plugin (no GPU): pip install --editable ".[gpu]"'),
]


def measured(case: Case) -> dict:
    order = {"case": dataclasses.asdict(case), "cache": None, "details": True, "steps": 0}
    found = run_measurement(order, limit=900)
    assert found["status"] == "ok", found
    return found


def test_what_a_product_needs_is_counted_and_no_time_is_made_up():
    found = measured(Case("none", "matmul", "h100", preset="none", text=0))
    assert found["memory"]["arguments"] == 2 * 2 * 4096**2  # two bfloat16 matrices
    assert found["stablehlo"]["flops"] == found["analytic_flops"]
    assert found["roofline_seconds"] == pytest.approx(found["analytic_flops"] / 989e12, rel=1e-6)
    assert found["estimated_seconds"] is None


def test_the_models_programs_compile_over_two_gpus():
    case = Case("flex:2", "decode", "h100:2", preset="tiny", text=8, depth=4)
    found = measured(case)
    assert found["devices"] == 2 and found["memory"]["peak"] > 0
    assert found["hlo"]["collectives"] and found["seconds"]["compile"] > 0
    assert found["hlo"]["data_loops"] == found["stablehlo"]["data_loops"]
