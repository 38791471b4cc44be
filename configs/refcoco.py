"""RefCOCO, RefCOCO+ and RefCOCOg: the box of the thing that a phrase describes.

python eval.py --config=configs/refcoco.py --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR

:refcocog_val (the released script's table), :refcocog_test, :refcoco_val, :refcoco_testA, :refcoco_testB,
:refcocoplus_val, :refcocoplus_testA, :refcocoplus_testB
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.settings import benchmark_config


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `variant` is what follows the colon in --config."""
    return benchmark_config("refcoco", variant)
