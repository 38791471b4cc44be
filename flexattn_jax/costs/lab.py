"""Measures a table of cases: one process at a time, each reading in a fresh one, each written down at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexattn_jax.config import ConfigError
from flexattn_jax.costs.cases import Case, Settings, expand
from flexattn_jax.costs.measure import FAILED, LATE, MISSING, OK
from flexattn_jax.costs.records import COLD, FILE, FILL, WARM, Costs, Record, resume, write_costs
from flexattn_jax.costs.targets import MissingCompiler, check_installed, environment, parse_target
from flexattn_jax.files import FileError, lock_file, private_folder

BUSY = 0.25  # cores in use by others from which a reading is too high to trust
_CACHE = ".compiled"  # of programs, which are run when they are found again


@dataclasses.dataclass(frozen=True)
class Job:
    """A reading that is to be made."""

    case: Case
    kind: str
    number: int


def measure_table(settings: Settings, folder: Path, say: Callable[[str], None]) -> tuple[list[Case], Costs]:
    """Measures what is still missing in folder/costs.json.

    Pass after pass over all cases, so that the table is whole early and a slow minute of the machine falls on one pass.

    Args:
      say: is given a line for each reading and for each warning.

    Returns:
      The cases in the order of the table, and all that was measured.

    Raises:
      ConfigError: settings that make no sense, a folder that cannot be used, or another process that measures here.
    """
    cases = expand(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workdir={folder} cannot be made: {error.strerror or error}") from error
    path = folder / FILE
    with _only_one():
        costs = resume(path)
        jobs = [job for job in plan(cases, settings) if not _settled(costs, job, settings)]
        busy_said, started, done = False, time.monotonic(), 0
        for number, job in enumerate(jobs):
            if _hopeless(costs, job):
                continue
            busy = busy_cores()
            if busy > BUSY and not busy_said:
                say(f"note: other processes use {busy:.1f} cores; seconds will be too high and spread wide")
                busy_said = True
            record = _read(job, settings, folder, busy)
            costs = costs.add(record)
            write_costs(path, costs)
            done += 1
            left = (time.monotonic() - started) / done * (len(jobs) - number - 1)
            say(
                f"[{number + 1}/{len(jobs)}] {job.case.name}: {_short(record)}"
                + (f"; {_time(left)} left" if left else "")
            )
        shutil.rmtree(folder / _CACHE, ignore_errors=True)
    return cases, costs


def plan(cases: list[Case], settings: Settings) -> list[Job]:
    """All readings of a table, in the order in which they are made."""
    jobs = [Job(case, COLD, number) for number in range(settings.passes) for case in cases]
    if settings.warm_cache:
        jobs += [job for case in cases for job in (Job(case, FILL, 0), Job(case, WARM, 0))]
    return jobs


def run_measurement(order: dict[str, Any], limit: float) -> dict[str, Any]:
    """A reading from a fresh process, which is ended with its children after `limit` seconds."""
    target = parse_target(order["case"]["target"])
    process = subprocess.Popen(
        [sys.executable, "-m", "flexattn_jax.costs.measure"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ
        | environment(target)
        | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        | {"JAX_TRACEBACK_FILTERING": "off"},  # else a note about it comes last, where `_death` looks for the error
        start_new_session=True,
        text=True,
    )
    try:
        out, errors = process.communicate(json.dumps(order), timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": LATE, "message": f"not done after {limit:g} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == 0:
        return json.loads(out)
    return {"status": FAILED, "message": _death(process.returncode, errors)}


def busy_cores(seconds: float = 0.5) -> float:
    """Cores that are in use on this machine, averaged over the given time; 0 where the system does not tell."""

    def ticks() -> int:
        user, nice, system, _, _, *rest = (int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        return user + nice + system + sum(rest)

    try:
        before = ticks()
        time.sleep(seconds)
        return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds
    except (OSError, ValueError):
        return 0.0


def _read(job: Job, settings: Settings, folder: Path, busy: float) -> Record:
    limit = settings.limit(job.case)
    cache = None
    if job.kind != COLD:
        place = folder / _CACHE
        if job.kind == FILL:
            shutil.rmtree(place, ignore_errors=True)
        try:
            cache = str(private_folder(place))
        except FileError as error:
            raise ConfigError(f"{place} {error}; remove it") from error
    first = job.kind == COLD and job.number == 0
    order = {
        "case": dataclasses.asdict(job.case),
        "cache": cache,
        "details": first,
        "steps": settings.steps if first else 0,
    }
    try:
        check_installed(parse_target(job.case.target))
        reading = run_measurement(order, limit)
    except MissingCompiler as error:
        reading = {"status": MISSING, "message": str(error)}
    return Record(job.case, job.kind, job.number, limit, busy, reading)


def _settled(costs: Costs, job: Job, settings: Settings) -> bool:
    """Whether an earlier run made this reading; one that failed, or had less time than now, is made again."""
    for record in costs.records:
        if (record.case, record.kind, record.number) == (job.case, job.kind, job.number):
            late = record.status == LATE and record.limit < settings.limit(job.case)
            return record.status not in (FAILED, MISSING) and not late
    return False


def _hopeless(costs: Costs, job: Job) -> bool:
    """Whether the first reading of this case already said that there will be no second one."""
    if (job.kind, job.number) == (COLD, 0):
        return False
    return any(r.case == job.case and (r.kind, r.number) == (COLD, 0) and r.status != OK for r in costs.records)


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """One process a machine and user measures; another one's compiler would be in every reading."""
    path = Path(tempfile.gettempdir(), f"flexattn_jax_costs_{os.getuid()}.lock")
    try:
        lock = lock_file(path, mode=0o600)
    except BlockingIOError as error:
        raise ConfigError("another compile_costs.py measures on this machine; wait until it is done") from error
    except OSError as error:
        raise ConfigError(f"{path}, which keeps two runs apart, cannot be opened: {error.strerror or error}") from error
    with lock:
        yield


def _death(code: int, errors: str) -> str:
    """Why a process died, from what it printed last."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        return "the process was killed, which the system does when memory runs out"
    last = lines[-1] if lines else "it printed nothing"
    return f"the process ended with {'signal' if code < 0 else 'code'} {abs(code)}: {last[:400]}"


def _short(record: Record) -> str:
    if record.status != OK:
        return f"{record.status}, {record.reading.get('message', '')[:120]}"
    seconds = record.reading["seconds"]
    kind = "" if record.kind == COLD else f", {record.kind} cache"
    return "trace {trace:.1f} s, lower {lower:.1f} s, compile {compile:.1f} s".format(**seconds) + kind


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
