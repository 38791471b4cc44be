"""MagnifierBench: multiple-choice questions about small things.

python eval.py --config=configs/magnifier.py --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.settings import benchmark_config


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `variant` is what follows the colon in --config."""
    return benchmark_config("magnifier", variant)
