"""Commands as processes, for the tests of whole runs."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DEVICES = 4  # of the processes of a run together


def command(settings, workdir):
    """train.py with `settings` on its command line."""
    words = [sys.executable, str(REPOSITORY / "train.py"), f"--config={REPOSITORY / 'configs' / 'train_llava.py'}"]

    def add(values, prefix):
        for name, value in values.items():
            if isinstance(value, dict):
                add(value, f"{prefix}.{name}")
            elif value is not None:
                words.append(f"--{prefix}.{name}={value}")

    add(settings, "config")
    return [*words, f"--workdir={workdir}"]


def start(words, compiled, **environment):
    """The command as a process, its programs kept in the folder `compiled`; `environment`: more variables."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in half the time
        **environment,
    }
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=REPOSITORY
    )


def read_metrics(workdir):
    """The whole lines of metrics.jsonl."""
    file = Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []


def free_port():
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


def begin(words, compiled, count, devices=DEVICES):
    """A command as `count` processes with so many devices together."""
    port = free_port()
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices // count}"
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        start(
            words,
            Path(compiled) / f"{count}-{number}",
            XLA_FLAGS=flags,
            **(several | {"JAX_PROCESS_ID": str(number)} if count > 1 else {}),
        )
        for number in range(count)
    ]


def finish(run, timeout=600):
    """What each process printed and its exit code."""
    said = [process.communicate(timeout=timeout)[0] for process in run]
    return said, [process.returncode for process in run]


def wait(run, holds):
    """Waits for something that no process of the run may end before."""
    deadline = time.monotonic() + 600
    while not holds():
        ended = [process for process in run if process.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
