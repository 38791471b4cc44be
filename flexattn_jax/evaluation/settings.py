"""The settings of `eval.py` for a benchmark of questions, which its files in configs/ share."""

from __future__ import annotations

from ml_collections import config_dict

from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.overrides import system_overrides


def benchmark_config(benchmark: str, variant: str = "") -> config_dict.ConfigDict:
    """The settings, with the benchmark's defaults.

    Args:
        benchmark: name in `BENCHMARKS`.
        variant: one of its variants; empty: the first.
    """
    chosen = BENCHMARKS[benchmark]
    if variant and variant not in chosen.variants:
        forms = [f"configs/{benchmark}.py" + (f":{name}" if name else "") for name in chosen.variants]
        raise ValueError(f"configs/{benchmark}.py has no {variant!r}; write {' or '.join(forms)}")
    config = config_dict.ConfigDict()
    config.benchmark = benchmark
    config.variant = variant or chosen.variants[0]
    config.data_dir = ""  # the benchmark as downloaded; docs/benchmarks.md shows the layout
    config.checkpoint = ""  # an imported or trained checkpoint, or published safetensors
    config.scorer = next(iter(chosen.scorers))  # docs/benchmarks.md lists them
    config.batch_size = 8  # changes the time it takes, and no answer
    config.tensor = 1  # devices that share the weights; a host's others take samples, other hosts other questions
    config.dtype = config_dict.placeholder(str)  # "float32" or "bfloat16"; None: float32 on CPU, else bfloat16
    config.weights = config_dict.placeholder(str)  # "int8": of the decoder, see api.load; None: as dtype says
    config.max_new_tokens = chosen.max_new_tokens  # where the model writes its answer
    config.limit = 0  # ask only the first so many questions of each split; 0: all
    config.pictures = 0  # PNGs of the selected cells to write for the first so many questions
    # What to change in the checkpoint's own configuration; None leaves a setting as it is.
    config.model_overrides = system_overrides()
    return config
