"""HR-Bench: multiple-choice questions about photographs of 4K and 8K pixels.

python eval.py --config=configs/hrbench.py --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR

:4k or :8k
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.settings import benchmark_config


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `variant` is what follows the colon in --config."""
    return benchmark_config("hrbench", variant)
