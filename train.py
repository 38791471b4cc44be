"""Trains a model: prints its progress, keeps checkpoints, writes the result to workdir/model.

python train.py --config=configs/train_llava.py --config.start.checkpoint=DIR --config.data.conversations=FILE \\
    --config.data.pictures=DIR --workdir=DIR

The same command run again goes on where a stopped run was.
"""

import pathlib

from absl import flags

from flexattn_jax.command_line import run_command
from flexattn_jax.processes import begin
from flexattn_jax.training.tasks import USER_ERRORS, run_task

_CONFIG = pathlib.Path(__file__).parent / "configs" / "train_llava.py"
_WORKDIR = flags.DEFINE_string("workdir", "runs/train", "Folder for this run's checkpoints, logs and model.")


def _train(settings: dict) -> None:
    begin()
    run_task(settings, _WORKDIR.value)


if __name__ == "__main__":
    run_command(_train, _CONFIG, USER_ERRORS)
