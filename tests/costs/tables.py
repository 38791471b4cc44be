"""Settings and readings for the tests of the table."""

import importlib.util
import pathlib
from types import ModuleType

from flexattn_jax.costs.cases import Case, Settings, read_settings
from flexattn_jax.costs.records import COLD, Costs, Record

FILE = pathlib.Path(__file__).parents[2] / "configs" / "compile_costs.py"


def config_file() -> ModuleType:
    """configs/compile_costs.py."""
    spec = importlib.util.spec_from_file_location("compile_costs_config", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(variant: str = "default", **changes) -> Settings:
    """Those of a variant of the config file, changed."""
    return read_settings(config_file().get_config(variant).to_dict() | changes)


def reading(seconds: float = 1.0, **more) -> dict:
    """What a measuring process returns."""
    return {"status": "ok", "seconds": {"trace": seconds, "lower": seconds, "compile": seconds}} | more


def costs(*readings: tuple[Case, dict], kind: str = COLD, busy: float = 0.0, environment: dict | None = None) -> Costs:
    """Records of readings, numbered in the order of each case."""
    records: list[Record] = []
    for case, values in readings:
        number = sum(record.case == case for record in records)
        records.append(Record(case, kind, number, 60.0, busy, values))
    return Costs(environment or {"python": "3", "versions": {"jax": "1"}, "flags": {}}, tuple(records))
