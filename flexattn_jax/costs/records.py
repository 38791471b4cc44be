"""costs.json: what was measured, one record a reading, written after each of them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from flexattn_jax.config import ConfigError, from_dict
from flexattn_jax.costs.cases import Case
from flexattn_jax.costs.measure import OK, STATUSES
from flexattn_jax.files import DATA_BYTES, FileError, read_json, write_whole

SCHEMA = 1
FILE = "costs.json"
COLD, FILL, WARM = "cold", "fill", "warm"  # no cache; a cache that is empty; the same cache once more

_PACKAGE = Path(__file__).parents[1]
# What decides the programs: a change there makes readings from before it incomparable.
_SOURCES = (
    *("config.py", "partitioning.py", "models", "ops", "highres", "inference"),
    *(f"training/{name}.py" for name in ("loss", "optimizer", "state", "step")),
    *(f"costs/{name}.py" for name in ("cases", "estimate", "hlo", "measure", "programs")),
    *(f"costs/{name}.py" for name in ("rankings", "stablehlo", "targets")),
)
_SECONDS = {"trace", "lower", "compile"}
_DISTRIBUTIONS = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


@dataclasses.dataclass(frozen=True)
class Record:
    """One reading.

    kind: COLD, FILL or WARM.
    number: of the reading among those of its kind, from 0.
    limit: seconds that it was given.
    busy: cores that other processes used just before it.
    reading: what `measure.measure` returned.
    """

    case: Case
    kind: str
    number: int
    limit: float
    busy: float
    reading: dict[str, Any]

    @property
    def status(self) -> str:
        """Of measure.STATUSES."""
        return self.reading["status"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The content of costs.json."""

    environment: dict[str, Any]
    records: tuple[Record, ...]

    def add(self, record: Record) -> Costs:
        """With one record more, which replaces an earlier one of the same reading."""
        kept = [r for r in self.records if (r.case, r.kind, r.number) != (record.case, record.kind, record.number)]
        return dataclasses.replace(self, records=(*kept, record))


def describe_environment() -> dict[str, Any]:
    """What readings depend on: versions, flags, the machine, and a digest of the code that makes the programs."""
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if os.environ.get(name)},
        "source": _source_digest(),
    }


def read_costs(path: Path) -> Costs:
    """Reads a costs.json.

    Raises:
      ConfigError: it cannot be read, or another version of this program wrote it.
    """
    try:
        values = read_json(path, DATA_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; name a file that compile_costs.py has written") from error
    except FileError as error:
        raise ConfigError(f"{path} {error}; name a file that compile_costs.py has written") from error
    try:
        if values["schema"] != SCHEMA:
            raise ConfigError(f"{path} has schema {values['schema']}, this version reads {SCHEMA}; measure again")
        records = tuple(_record(values) for values in values["records"])
        return Costs(dict(values["environment"]), records)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no file of compile_costs.py's ({error}); name one, or delete it and measure again"
        ) from error


def _record(values: dict[str, Any]) -> Record:
    case, reading = from_dict(values["case"], Case, "case."), values["reading"]
    if reading["status"] not in STATUSES or (reading["status"] == OK and set(reading["seconds"]) != _SECONDS):
        raise ConfigError("a reading without its seconds")
    return Record(
        case, str(values["kind"]), int(values["number"]), float(values["limit"]), float(values["busy"]), reading
    )


def write_costs(path: Path, costs: Costs) -> None:
    """Writes the file whole or not at all."""
    values = {
        "schema": SCHEMA,
        "environment": costs.environment,
        "records": [dataclasses.asdict(record) for record in costs.records],
    }
    write_whole(path, json.dumps(values, indent=1) + "\n")


def resume(path: Path) -> Costs:
    """What a stopped run left, or nothing yet.

    Raises:
      ConfigError: what is there was measured with other versions, another machine or other code.
    """
    environment = describe_environment()
    if not path.exists():
        return Costs(environment, ())
    costs = read_costs(path)
    changed = [name for name in environment if costs.environment.get(name) != environment[name]]
    if changed:
        raise ConfigError(
            f"{path} was measured with another {', '.join(changed)}; give a new --workdir, or delete it, and compare "
            "the two with: compile_costs.py diff OLD NEW"
        )
    return costs


def cpu_model() -> str:
    """Of this machine, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _source_digest() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        place = _PACKAGE / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
