"""VQAv2: questions about COCO's photographs.

python eval.py --config=configs/vqav2.py --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR

:test-dev writes answers for the evaluation server; :val is scored here
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.settings import benchmark_config


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `variant` is what follows the colon in --config."""
    return benchmark_config("vqav2", variant)
