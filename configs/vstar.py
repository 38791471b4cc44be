"""V* Bench: multiple-choice questions about small things in large photographs.

python eval.py --config=configs/vstar.py                 the packaged demo: real photographs, random weights, offline
python eval.py --config=configs/vstar.py:7b --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR

DIR is https://huggingface.co/datasets/craigwu/vstar_bench as downloaded, and the folder of
senfu/llava-v1.5-7b-flexattn or of a LLaVA-1.5 checkpoint, imported or as safetensors.
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.demo import CHECKPOINT, demo_questions
from flexattn_jax.evaluation.settings import benchmark_config


def get_config(arg: str = "demo") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `arg` is what follows the colon in --config."""
    if arg not in ("demo", "7b"):
        raise ValueError(f"configs/vstar.py has no {arg!r}; write configs/vstar.py:demo or configs/vstar.py:7b")
    config = benchmark_config("vstar")
    if arg == "demo":
        config.data_dir = str(demo_questions())
        config.checkpoint = CHECKPOINT  # random weights, written on first use
    return config
