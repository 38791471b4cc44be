"""Runs commands one after the other, each in a child of this process, so that JAX is imported once.

Reads a JSON list of [script, arguments] from the standard input; prints a list of [exit code, output, errors].
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
import warnings

# What takes long, before the children part.
import flexattn_jax.costs.run
import flexattn_jax.evaluation.run
import flexattn_jax.evaluation.settings
import flexattn_jax.training.tasks  # noqa: F401

SECONDS = 120  # that a command may take


def run(script: str, arguments: list[str]) -> tuple[int, str, str]:
    """A negative exit code is a signal's, SIGALRM's after SECONDS."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv = [script, *arguments]
            try:
                runpy.run_path(script, run_name="__main__")
                code = 0
            except SystemExit as exit_:
                code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return code, *texts


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*fork")  # no thread of JAX's runs before the first computation
    print(json.dumps([run(script, arguments) for script, arguments in json.load(sys.stdin)]))
