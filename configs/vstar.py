"""V* Bench: multiple-choice questions about small things in large photographs.

python eval.py --config=configs/vstar.py                 the packaged mini model on vsearch, offline (docs/mini.md)
python eval.py --config=configs/vstar.py:mini,compare    beside those that it is compared with
python eval.py --config=configs/vstar.py:mini,compare --config.models=DIR      models that you trained
python eval.py --config=configs/vstar.py:random          the way of the 7B model on real photographs, random weights
python eval.py --config=configs/vstar.py:7b --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR

DIR is https://huggingface.co/datasets/craigwu/vstar_bench as downloaded, and the folder of
senfu/llava-v1.5-7b-flexattn or of a LLaVA-1.5 checkpoint, imported or as safetensors.
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.demo import CHECKPOINT, demo_questions
from flexattn_jax.evaluation.search_run import ARMS
from flexattn_jax.evaluation.settings import benchmark_config
from flexattn_jax.overrides import flexattention_overrides


def get_config(arg: str = "mini") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `arg` is what follows the colon in --config."""
    if arg in ("mini", "mini,compare"):
        return _mini(tuple(ARMS) if arg == "mini,compare" else ("flex",))
    if arg not in ("random", "7b"):
        raise ValueError(f"configs/vstar.py has no {arg!r}; write :mini, :mini,compare, :random or :7b")
    config = benchmark_config("vstar")
    if arg == "random":
        config.data_dir = str(demo_questions())
        config.checkpoint = CHECKPOINT  # random weights, written on first use
    return config


def _mini(arms: tuple[str, ...]) -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.benchmark = "vsearch"
    config.models = ""  # folder of the arms' trained models, such as runs/mini/seed0; empty: the packaged ones
    config.arms = arms  # rows of the table, see evaluation/search_run.py
    config.preset = "standard"  # of vsearch, or "crowded"
    config.split = "test"  # or "test_art": objects by an artist that no other split has
    config.seed = 0  # of the pictures
    config.data_dir = ""  # where they are drawn to; empty: the user's data folder
    config.limit = 0  # ask about only the first so many pictures; 0: all
    config.batch_size = 4  # pictures at once; changes no answer
    config.pictures = 0  # PNGs of the selected cells to write for the first so many questions
    config.dtype = config_dict.placeholder(str)
    config.weights = config_dict.placeholder(str)  # "int8": of the decoder, see api.load
    # What to change in every arm's configuration; None leaves a setting as it is.
    config.model_overrides = config_dict.ConfigDict({"flexattention": flexattention_overrides()})
    return config
