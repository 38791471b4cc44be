"""Evaluates a checkpoint on a benchmark: prints a table, writes results.json and predictions.jsonl.

python eval.py --config=configs/vstar.py:7b --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR

The benchmarks are the files in configs/ but train_*.py and compile_costs.py; docs/benchmarks.md says what each of them
needs. The same command run again goes on where a killed run stopped.
"""

import pathlib

from absl import flags

from flexattn_jax.command_line import run_command
from flexattn_jax.evaluation.run import USER_ERRORS, run_benchmark
from flexattn_jax.processes import begin

_CONFIG = pathlib.Path(__file__).parent / "configs" / "vstar.py"
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of predictions, results and pictures; empty: runs/BENCHMARK.")


def _evaluate(settings: dict) -> None:
    begin()
    run_benchmark(settings, _WORKDIR.value)


if __name__ == "__main__":
    run_command(_evaluate, _CONFIG, USER_ERRORS)
