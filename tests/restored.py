"""python restored.py SETTINGS.json WORKDIR prints the digests of the newest checkpoint's arrays, by any processes."""

import functools
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from flexattn_jax.checkpoints.trees import flatten, param_shapes
from flexattn_jax.config import dotted, from_dict
from flexattn_jax.partitioning import make_partition, with_shardings
from flexattn_jax.processes import begin, is_first
from flexattn_jax.training.checkpoints import Checkpointer
from flexattn_jax.training.optimizer import build_optimizer
from flexattn_jax.training.run import RunConfig
from flexattn_jax.training.start import open_start
from flexattn_jax.training.state import create_state


def main(settings, workdir):
    """Restores into the shardings of a run and brings every array together."""
    begin()
    overrides = dotted(settings.pop("model"))
    settings.pop("task")
    for name in ("conversations", "pictures", "max_length", "follow_links"):
        del settings["data"][name]
    config = from_dict(settings, RunConfig)
    start = open_start(config.start, overrides, config.seed)
    create = functools.partial(
        create_state, config=config.optimizer, optimizer=build_optimizer(config.optimizer, 7), seed=config.seed
    )
    like = jax.eval_shape(create, param_shapes(start.config))
    partition = make_partition(config.partition, samples=config.batch_size)
    checkpointer = Checkpointer(workdir, 2)
    state, _ = checkpointer.restore(checkpointer.latest_step, with_shardings(like, partition.state_shardings(like)))
    checkpointer.close()
    digests = {}
    for path, leaf in flatten(state.params).items():
        whole = multihost_utils.process_allgather(leaf, tiled=True) if jax.process_count() > 1 else leaf
        digests[path] = hashlib.sha256(np.asarray(whole).tobytes()).hexdigest()
    if is_first():
        print(json.dumps({"step": int(state.step), "digests": digests}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
