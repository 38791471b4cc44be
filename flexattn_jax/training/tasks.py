"""What can be trained, by name: what train.py calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexattn_jax.config import ConfigError
from flexattn_jax.inputs.datasets.vsearch import VSearchError
from flexattn_jax.inputs.datasets.vsearch_scenes import AssetError
from flexattn_jax.training import run
from flexattn_jax.training.search_run import run_search

USER_ERRORS = (*run.USER_ERRORS, VSearchError, AssetError)

TASKS: dict[str, Callable[[Mapping[str, Any], str | Path], Path]] = {"llava": run.run_llava, "search": run_search}


def run_task(settings: Mapping[str, Any], workdir: str | Path) -> Path:
    """Trains what `settings["task"]` names; gives the folder of the model. Raises one of USER_ERRORS."""
    name = settings["task"]
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    others = copy.copy(settings)  # of the same kind, which says what is missing
    del others["task"]
    return TASKS[name](others, workdir)
