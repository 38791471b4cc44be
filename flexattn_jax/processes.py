"""Several processes of one run: how they find each other, do once what is done once, and stop together.

A process is started on every host (and, by SLURM, for every GPU). They hold one mesh, and each makes the samples of its
own devices. The first one logs and writes; all of them write checkpoints.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from flexattn_jax.files import FileError, first_line, printable
from flexattn_jax.partitioning import Partition

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = 60  # seconds of silence after which a process counts as dead
WAIT = 300  # seconds that the first process waits for the others to begin


class ProcessFault(ValueError):
    """Processes that do not make one run; the message says what to do."""


def described(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given, or None where the environment tells of one process alone.

    It tells of several by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; by SLURM's variables inside of
    srun; on a TPU host by itself, and JAX asks the host.

    Raises:
      ProcessFault: it tells of several, but not which of them this one is.
    """
    given = [name for name in (ADDRESS, COUNT, NUMBER) if environment.get(name)]
    if given:
        missing = [name for name in (ADDRESS, COUNT, NUMBER) if not environment.get(name)]
        numbers = [environment.get(name, "") for name in (COUNT, NUMBER)]
        if missing or not all(number.isdigit() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
            raise ProcessFault(
                f"{', '.join(f'{name}={environment[name]}' for name in given)} tells of several processes; give all of "
                f"{ADDRESS}=HOST:PORT, {COUNT} and {NUMBER} (from 0 to one less than their count), or none of them"
            )
        count, number = map(int, numbers)
        return {"coordinator_address": environment[ADDRESS], "num_processes": count, "process_id": number}
    if int(environment.get("SLURM_JOB_NUM_NODES", 1)) > 1 and "SLURM_PROCID" not in environment:
        raise ProcessFault(
            f"this SLURM job has {environment['SLURM_JOB_NUM_NODES']} nodes, but the command was started on one of "
            "them alone; start it with srun, which starts it on all"
        )
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return {}  # JAX reads SLURM's variables
    if len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or _on_tpu_host(environment):
        return {}
    return None


def begin() -> None:
    """Joins the processes of a run where the environment tells of several; to be called before JAX is used.

    Raises:
      ProcessFault: the others do not come.
    """
    settings = described(os.environ)
    if settings is None:
        return
    # Signals are the loop's to handle: its processes agree on the step after which they stop.
    jax.config.update("jax_enable_preemption_service", False)
    if os.environ.get("JAX_PLATFORMS") == "cpu":  # gloo wants programs one after the other
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    own = f"process {settings['process_id']} of {settings['num_processes']}" if settings else "this process"
    print(f"{own} waits for the others, up to {WAIT} s", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            **settings, initialization_timeout=WAIT, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessFault(
            f"{own} did not find the others within {WAIT} s ({first_line(error)}). Start the same command on every "
            "host (docs/pods.md): on a TPU pod with --worker=all, under SLURM with srun. To use this host alone on a "
            "pod, set TPU_PROCESS_BOUNDS and TPU_CHIPS_PER_PROCESS_BOUNDS as its documentation says"
        ) from None


def is_first() -> bool:
    """Whether this is the process that logs."""
    return jax.process_index() == 0


def on_first(work: Callable[[], Any]) -> Any:
    """What `work` gives on the first process, handed to all as JSON types; an error there is raised on all.

    Raises:
      ProcessFault: with the message of the error, on the others.
    """
    if jax.process_count() == 1:
        return work()
    answer, failure = b"", None
    if is_first():
        try:
            answer = json.dumps({"value": work()}).encode()
        except Exception as error:
            failure = error
            answer = json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
    buffer = np.frombuffer(answer.ljust(size, b" "), np.uint8) if is_first() else np.zeros(size, np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes())
    if failure is not None:
        raise failure
    if "error" in told:
        raise ProcessFault(told["error"])
    return told["value"]


def check_shared(folder: Path, file: str) -> None:
    """Raises ProcessFault on all processes unless each of them sees `file`, which the first has written to `folder`."""
    if jax.process_count() == 1:
        return
    with contextlib.suppress(OSError):
        os.listdir(folder)  # network file systems remember what was not there
    seen = np.asarray(multihost_utils.process_allgather(np.int32((folder / file).is_file())))
    if not seen.all():
        blind = ", ".join(map(str, np.flatnonzero(seen == 0)))
        raise ProcessFault(
            f"the workdir {folder} is not the same folder for all processes: {blind} of {len(seen)} do not see what "
            "process 0 writes there; give a --workdir on storage that all hosts share"
        )


class Vote:
    """Whether any process wants to stop, asked once a step of all of them without waiting for an answer."""

    def __init__(self, partition: Partition):
        axes = tuple(partition.mesh.axis_names)
        self._sharding = NamedSharding(partition.mesh, PartitionSpec(axes))
        self._count = partition.mesh.size
        self._any = jax.jit(lambda votes: votes.max(), out_shardings=partition.replicated)

    def cast(self, wanted: bool) -> jax.Array:
        """The answer of all, () int32, 1 for yes, once it has been computed. Every process must ask equally often."""
        votes = jax.make_array_from_callback(
            (self._count,), self._sharding, lambda index: np.full(len(range(self._count)[index[0]]), wanted, np.int32)
        )
        return self._any(votes)


@contextlib.contextmanager
def together(user_errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Ends this process at once, with a message, when something in the block fails on it or on another one.

    Nothing is waited for: what an orderly end would wait for is what the other processes no longer do.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        own, code = f"process {jax.process_index()} of {jax.process_count()}", 1
        if isinstance(error, (*user_errors, FileError, OSError)):
            message, code = printable(str(error)), 2
        elif isinstance(error, jax.errors.JaxRuntimeError) or isinstance(error.__cause__, jax.errors.JaxRuntimeError):
            message = (
                f"another process ended or cannot be reached ({first_line(error)}). This one stops, too; its log or "
                "another's says why. The newest whole checkpoint is kept: start all processes again to go on from it"
            )
        else:
            message = traceback.format_exc()
        print(f"{own}: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


def _on_tpu_host(environment: Mapping[str, str]) -> bool:
    """Whether chips are attached and may be used."""
    if environment.get("JAX_PLATFORMS", "tpu") not in ("", "tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
