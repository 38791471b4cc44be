"""Measuring a table: what is kept, what is made again, what a broken case leaves behind."""

import dataclasses
import json
import os
import signal

import pytest
from costs.tables import reading, settings

from flexattn_jax.config import ConfigError
from flexattn_jax.costs import lab, records
from flexattn_jax.costs.cases import Case
from flexattn_jax.costs.records import COLD, FILL, WARM, read_costs

ONE = {"presets": "tiny", "programs": "decode", "targets": "cpu", "layers": "scanned", "passes": 2}


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """No process is started; orders are written down and answered from a queue, then with 1 s each."""
    orders, answers = [], []

    def run(order, limit):
        orders.append(order | {"limit": limit})
        answer = answers.pop(0) if answers else reading()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(lab, "run_measurement", run)
    monkeypatch.setattr(lab, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(lab.tempfile, "gettempdir", lambda: str(tmp_path))
    return orders, answers


def measure(tmp_path, **changes):
    said = []
    cases, costs = lab.measure_table(settings(**ONE | changes), tmp_path / "runs", said.append)
    return cases, costs, said


def test_every_reading_is_written_at_once_pass_after_pass(quiet, tmp_path):
    orders, _ = quiet
    cases, costs, said = measure(tmp_path, systems="lowres,flex:2")
    assert [order["case"]["system"] for order in orders] == ["lowres", "flex:2", "lowres", "flex:2"]
    assert [order["details"] for order in orders] == [True, True, False, False]
    assert len(said) == 4 and "[4/4]" in said[-1]
    assert read_costs(tmp_path / "runs" / "costs.json") == costs
    assert [case.system for case in cases] == ["lowres", "flex:2"]


def test_a_stopped_run_goes_on_and_failed_readings_are_made_again(quiet, tmp_path):
    orders, answers = quiet
    answers += [reading(), {"status": "failed", "message": "no"}, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, systems="lowres,flex:2,flex:all")
    assert len(read_costs(tmp_path / "runs" / "costs.json").records) == 2
    orders.clear()
    _, costs, _ = measure(tmp_path, systems="lowres,flex:2,flex:all")
    done = [(order["case"]["system"], order["details"]) for order in orders]
    assert done == [("flex:2", True), ("flex:all", True), ("lowres", False), ("flex:2", False), ("flex:all", False)]
    assert len(costs.records) == 6 and all(record.status == "ok" for record in costs.records)
    orders.clear()
    measure(tmp_path, systems="lowres,flex:2,flex:all")
    assert not orders


def test_a_case_that_is_late_or_too_large_is_read_once_and_the_table_goes_on(quiet, tmp_path):
    orders, answers = quiet
    answers += [
        {"status": "time limit", "message": "not done after 60 s"},
        reading(status="does not fit", message="15G"),
    ]
    changes = {"systems": "lowres,flex:2,flex:all"}
    _, _, said = measure(tmp_path, **changes)
    assert [order["case"]["system"] for order in orders] == ["lowres", "flex:2", "flex:all", "flex:all"]
    assert "time limit" in said[0] and "does not fit, 15G" in said[1]
    orders.clear()
    measure(tmp_path, **changes)
    assert not orders
    measure(tmp_path, **changes, time_limit=1000.0)  # more time than it had
    assert [order["case"]["system"] for order in orders] == ["lowres", "lowres"]


def test_a_warm_cache_is_filled_by_one_process_and_read_by_another(quiet, tmp_path):
    orders, _ = quiet
    _, costs, _ = measure(tmp_path, systems="lowres", warm_cache=True, passes=1)
    assert [record.kind for record in costs.records] == [COLD, FILL, WARM]
    caches = [order["cache"] for order in orders]
    assert caches[0] is None and caches[1] == caches[2] == str(tmp_path / "runs" / ".compiled")
    assert not os.path.exists(caches[1])  # gone when the table is done


def test_a_busy_machine_is_said_once_and_noted_in_each_reading(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "busy_cores", lambda: 1.4)
    _, costs, said = measure(tmp_path, systems="lowres")
    assert [line for line in said if line.startswith("note:")] == [said[0]] and "1.4 cores" in said[0]
    assert [record.busy for record in costs.records] == [1.4, 1.4]


def test_readings_of_other_code_are_not_mixed(quiet, tmp_path, monkeypatch):
    measure(tmp_path, systems="lowres")
    monkeypatch.setattr(records, "_source_digest", lambda: "another")
    with pytest.raises(ConfigError, match=r"measured with another source; give a new --workdir"):
        measure(tmp_path, systems="lowres")


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 1}', '{"schema": 99, "records": []}'])
def test_a_file_that_is_not_ours_is_refused(quiet, tmp_path, content):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "costs.json").write_text(content)
    with pytest.raises(ConfigError, match=r"costs\.json (is not valid JSON|is no file|has schema 99)"):
        measure(tmp_path, systems="lowres")


def test_a_folder_that_cannot_be_made_is_one_sentence(quiet, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"--workdir=.* cannot be made"):
        measure(tmp_path, systems="lowres")


def test_two_runs_do_not_measure_at_once(quiet, tmp_path):
    with lab._only_one(), pytest.raises(ConfigError, match="another compile_costs"):
        measure(tmp_path, systems="lowres")


def test_a_missing_compiler_is_a_row_that_says_what_to_install(quiet, tmp_path, monkeypatch):
    orders, _ = quiet
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, costs, _ = measure(tmp_path, systems="lowres", targets="v5e:2x2,h100")
    assert not orders
    assert [record.status for record in costs.records] == ["compiler missing"] * 2
    messages = [record.reading["message"] for record in costs.records]
    assert '--editable ".[tpu]"' in messages[0] and '--editable ".[gpu]"' in messages[1]


def order(**changes):
    case = dataclasses.asdict(dataclasses.replace(Case("lowres", "matmul", "cpu", preset="none", text=0), **changes))
    return {"case": case, "cache": None, "details": False, "steps": 0}


def test_a_process_that_is_late_is_ended(tmp_path):
    assert lab.run_measurement(order(), limit=0.05) == {"status": "time limit", "message": "not done after 0.05 s"}


def test_a_process_that_dies_leaves_its_last_words(monkeypatch):
    monkeypatch.setattr(lab.sys, "executable", "/bin/false")
    assert lab.run_measurement(order(), limit=60)["message"] == "the process ended with code 1: it printed nothing"
    assert "memory runs out" in lab._death(-signal.SIGKILL, "")
    assert lab._death(-signal.SIGABRT, "one\ntwo\n\n").endswith("signal 6: two")


def test_a_reading_of_a_whole_case_comes_from_a_process_of_its_own(tmp_path):
    changes = {"program": "decode", "preset": "tiny", "text": 8, "dtype": "float32", "system": "flex:2"}
    changes |= {"options": "--xla_backend_optimization_level=0"}  # compiles in half the time
    found = lab.run_measurement(order(**changes) | {"details": True, "steps": 1}, limit=300)
    assert found["status"] == "ok", found
    assert set(found["seconds"]) == {"trace", "lower", "compile"} and min(found["seconds"].values()) > 0
    assert found["host_peak_bytes"] > 2**27
    assert found["memory"]["peak"] > found["memory"]["aliased"] > 0  # the cache is updated in place
    assert found["stablehlo"]["data_loops"] == found["hlo"]["data_loops"] == 2
    assert found["estimated_seconds"] is None  # a CPU's compiler estimates nothing
    assert found["executable_bytes"] > 0 and found["assumption"] == "a layer projects 0 and reads 2 cells"
    assert len(found["step_seconds"]) == 1
    json.dumps(found)
