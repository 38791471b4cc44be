"""V* Bench: multiple-choice questions about small things in large photographs.

python eval.py --config=configs/vstar.py                 the packaged demo: real photographs, random weights, offline
python eval.py --config=configs/vstar.py:7b --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.demo import CHECKPOINT, demo_questions


def get_config(arg: str = "demo") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `arg` is what follows the colon in --config."""
    if arg not in ("demo", "7b"):
        raise ValueError(f"configs/vstar.py has no {arg!r}; write configs/vstar.py:demo or configs/vstar.py:7b")
    config = config_dict.ConfigDict()
    config.benchmark = "vstar"
    # 7b: V* Bench as downloaded from https://huggingface.co/datasets/craigwu/vstar_bench
    config.data_dir = str(demo_questions()) if arg == "demo" else ""
    # 7b: senfu/llava-v1.5-7b-flexattn or a LLaVA-1.5 checkpoint, imported or as safetensors.
    # demo: random weights, written on first use.
    config.checkpoint = CHECKPOINT if arg == "demo" else ""
    config.scorer = "released"  # or "official", "generate"
    config.batch_size = 8  # changes the time it takes, and no answer
    config.dtype = config_dict.placeholder(str)  # "float32" or "bfloat16"; None: float32 on CPU, else bfloat16
    config.max_new_tokens = 16  # of scorer "generate"
    config.limit = 0  # ask only the first so many questions of each split; 0: all
    config.pictures = 0  # PNGs of the selected cells to write for the first so many questions
    # What to change in the checkpoint's own configuration; None leaves a setting as it is.
    config.model_overrides = config_dict.ConfigDict(
        {
            "flexattention": {
                "enabled": config_dict.placeholder(bool),  # False: the same weights read low resolution only
                "first_layer": config_dict.placeholder(int),
                "variant": config_dict.placeholder(str),  # "released" or "paper"
                "selector": config_dict.placeholder(str),  # "attention", "random", "center" or "all"
                "selection": config_dict.placeholder(str),  # "threshold" or "top_k"
                "threshold": config_dict.placeholder(float),
                "ablation_share": config_dict.placeholder(float),
                "seed": config_dict.placeholder(int),
                "capacity": config_dict.placeholder(int),
                "union_capacity": config_dict.placeholder(int),
            }
        }
    )
    return config
