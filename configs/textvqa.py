"""TextVQA: questions about text in photographs.

python eval.py --config=configs/textvqa.py --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR

:ocr adds LLaVA's OCR tokens to the prompts, another protocol with other figures
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.settings import benchmark_config


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `variant` is what follows the colon in --config."""
    return benchmark_config("textvqa", variant)
