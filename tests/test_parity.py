"""Recorded outputs of the reference implementation, and what the comparison does with damaged cases."""

import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from rich.console import Console

from flexattn_jax import parity

GOLDEN = pathlib.Path(__file__).parent / "golden"


def run(folder):
    out = io.StringIO()
    return parity.run(folder, Console(file=out, width=200)), out.getvalue()


def copy(name, folder):
    record = json.loads((GOLDEN / f"{name}.json").read_text())
    for file in (f"{name}.json", f"{name}.npz", record["weights"]):
        shutil.copy(GOLDEN / file, folder / file)
    return folder / f"{name}.json"


@pytest.mark.parametrize("case", ["v4_small_resize_504", "t2_train_text_only_alpha"])
def test_small_cases_hold(case, tmp_path):
    copy(case, tmp_path)
    holds, report = run(tmp_path)
    assert holds, report


@pytest.mark.slow
def test_all_cases_hold_together():
    holds, report = run(GOLDEN)
    assert holds, report


@pytest.mark.slow
def test_one_changed_entry_of_any_array_is_noticed():
    """Every comparison can fail: one entry of each recorded array is changed, the model is not."""
    case = parity.read_case(GOLDEN / "v4_small_resize_504.json")
    inputs = {"input_ids", "raw_u8", "hidden_row_idx"}
    for name, array in case.arrays.items():
        if name not in inputs:
            array.flat[-1] = ~array.flat[-1] if array.dtype == bool else array.flat[-1] + 1
    noticed = {check.name for check in parity.check_inference(case, []) if not check.holds}
    assert noticed == set(case.arrays) - inputs


@pytest.mark.slow
def test_a_changed_loss_or_gradient_is_noticed():
    case = parity.read_case(GOLDEN / "t2_train_text_only_alpha.json")
    for name in ("loss", "logits", "base_loss", "base_logits", "expanded_labels", "image_range"):
        case.arrays[name] = case.arrays[name] + 1
    gradients = [name for name in case.arrays if name.startswith("grad::")]
    for name in gradients:
        case.arrays[name].flat[0] += 0.01
    noticed = {check.name for check in parity.check_training(case) if not check.holds}
    assert noticed >= {"loss", "base_loss", "expanded_labels", "image_range", "logits of sample 0", *gradients}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.with_suffix(".npz").unlink(), "cannot be read"),
        (lambda p: p.with_suffix(".npz").write_bytes(p.with_suffix(".npz").read_bytes()[:5000]), "cannot be read"),
        (lambda p: p.write_text(p.read_text()[:300]), "no description of a case"),
        (
            lambda p: p.write_text(p.read_text().replace('"kind": "inference"', '"kind": "other"')),
            "known are inference",
        ),
        (lambda p: (p.parent / "weights_b.safetensors").unlink(), "weights_b.safetensors"),
        (lambda p: p.write_text(p.read_text().replace('"hidden_size": 64', '"hidden_size": 96')), "shape"),
    ],
)
def test_a_damaged_case_is_an_error_and_not_a_skip(damage, message, tmp_path):
    damage(copy("v5_small_none_selected", tmp_path))
    holds, report = run(tmp_path)
    assert not holds and message in report and "error" in report


def test_a_case_without_one_of_its_arrays_is_an_error(tmp_path):
    path = copy("v5_small_none_selected", tmp_path)
    record = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "map255"}
    np.savez(path.with_suffix(".npz"), **arrays)
    assert "map255 missing" in run(tmp_path)[1]
    del record["arrays"]["map255"]
    path.write_text(json.dumps(record))
    holds, report = run(tmp_path)
    assert not holds and "map255 missing" in report


def test_a_folder_without_cases_is_an_error(tmp_path):
    holds, report = run(tmp_path)
    assert not holds and "holds no case" in report
