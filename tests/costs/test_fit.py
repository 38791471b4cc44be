"""Whether a run fits: settings into a program, the search for the largest batch, and what estimates imply."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import pytest

from flexattn_jax.config import ConfigError
from flexattn_jax.costs.fit import Answer, fit_of, largest_batch, moved_bytes, run_fit, utilisation
from flexattn_jax.costs.measure import NO_ROOM, OK
from flexattn_jax.costs.programs import device_bytes, fit_program
from flexattn_jax.costs.targets import parse_target


@pytest.fixture
def settings():
    file = Path(__file__).parents[2] / "configs" / "train_llava.py"
    spec = importlib.util.spec_from_file_location("train_llava", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("instruct").to_dict()


def test_the_program_is_that_of_the_training_config(settings):
    fit = fit_of(settings, "7b", "model", 256)
    assert (fit.samples, fit.text, fit.readers) == (384, 1472, 1472)
    assert fit.config["remat"] == "dots" and fit.config["dtype"] == "bfloat16" and fit.config["flexattention"]
    assert (fit.partition["preset"], fit.partition["tensor"]) == ("fsdp", 2)  # 384 samples on 256 devices
    low = fit_of(settings, "7b", "lowres", 64)
    assert low.config["flexattention"] is None and low.config["image_size"] == 336 and low.partition["tensor"] == 1
    settings["partition"]["fsdp"] = 5
    with pytest.raises(ConfigError, match="does not fit the 64 devices"):
        fit_of(settings, "7b", "model", 64)


def test_a_tiny_step_is_built_with_what_lies_on_a_device(settings):
    settings["data"].update(text_lengths=(16,), answer_rows=(4,))
    settings["batch_size"] = 2
    fit = fit_of(settings, "tiny", "model", 1)
    program = fit_program(dataclasses.replace(fit, config=fit.config | {"dtype": "float32"}), jax.devices()[:1])
    state, batch = program.arguments
    assert program.notes["granule"] == 1 and program.notes["state"] == device_bytes(state)
    # Float32 moments of two kinds for what is trained, and the parameters.
    assert program.notes["state"] > 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    assert batch.labels.shape == (2, 16 + 16) and program.analytic_flops > 0


@pytest.mark.parametrize(
    ("room", "first", "step"), [(17, 8, 1), (17, 8, 4), (100, 8, 4), (3, 8, 1), (0, 4, 4), (8, 8, 8)]
)
def test_the_largest_batch_is_found_by_bisection(room, first, step):
    asked = []

    def fits(samples):
        asked.append(samples)
        return samples <= room

    found = largest_batch(fits, first, step, {"status": OK if first <= room else NO_ROOM})
    assert found == room // step * step and first not in asked and len(asked) < 12


def test_what_is_reduced_is_sent_twice():
    found = {"all-reduce": {"count": 2.0, "bytes": 10.0}, "all-gather": {"count": 1.0, "bytes": 7.0}}
    assert moved_bytes(found) == 27 and moved_bytes({}) == 0


def test_estimates_imply_a_utilisation():
    target = parse_target("v5e:2x2")
    answer = Answer(
        "model", OK, "", 8, {}, {}, 0, seconds=1.0, network_seconds=0.5, flops=0.6 * 4 * 197e12, largest=None
    )
    assert utilisation(answer, target, 4, waiting=False) == pytest.approx(0.6)
    assert utilisation(answer, target, 4, waiting=True) == pytest.approx(0.4)
    slow = dataclasses.replace(answer, network_seconds=2.0)
    assert utilisation(slow, target, 4, waiting=False) == pytest.approx(0.3)
    assert utilisation(dataclasses.replace(answer, seconds=None), target, 4, True) is None


def test_what_cannot_be_asked_is_said(settings):
    options = {"topology": "cpu", "systems": "model", "preset": "7b", "largest": False, "time_limit": 1.0, "json": ""}
    with pytest.raises(ConfigError, match="name chips, such as v5e:16x16"):
        run_fit(settings, options)
    with pytest.raises(ConfigError, match=r"one of configs/train_llava\.py"):
        run_fit(settings | {"task": "search"}, options | {"topology": "v5e:2x2"})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install --editable ".[tpu]"')
def test_a_small_model_is_asked_about(settings, capsys):
    settings["data"].update(text_lengths=(32,), answer_rows=(8,))
    settings["batch_size"] = 8
    options = {"systems": "model,lowres", "preset": "tiny", "largest": False, "time_limit": 900.0, "json": ""}
    settings["partition"].update(tensor=2, largest_replicated=3000)
    flex, low = run_fit(settings, options | {"topology": "v5e:2x2"})
    assert flex.status == low.status == OK, (flex.message, low.message)
    assert flex.memory["peak"] > flex.memory["state"] > low.memory["state"] > 0 and flex.collectives
    assert flex.seconds > 0 and flex.flops > low.flops
    assert flex.selecting_collectives == 0 and low.selecting_collectives is None
    assert "utilisation" in capsys.readouterr().out
