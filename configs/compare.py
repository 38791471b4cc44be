"""Systems beside each other on benchmarks: accuracy with intervals, tokens read, operations, times, memory.

python eval.py --config=configs/compare.py --workdir=DIR                                the packaged models on vsearch
python eval.py --config=configs/compare.py --config.models=runs/mini --workdir=DIR      models that you trained
python eval.py --config=configs/compare.py:mini,ablation --workdir=DIR    FlexAttention's ablations, with its weights
python eval.py --config=configs/compare.py:7b --config.models=DIR --config.data_dirs.vstar=DIR --workdir=DIR

A model is looked for in MODELS/seedN/ARM/model, as tools/mini_study.py writes them, or in MODELS/ARM; one that is not
there is a row that says which command makes it. The same command run again goes on where a stopped run was.
"""

from ml_collections import config_dict

from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.systems import COMPARISONS


def get_config(arg: str = "mini") -> config_dict.ConfigDict:
    """The settings of `eval.py`; `arg` is what follows the colon in --config."""
    if arg not in COMPARISONS:
        raise ValueError(f"configs/compare.py has no {arg!r}; write :{' or :'.join(COMPARISONS)}")
    config = config_dict.ConfigDict()
    config.benchmark = "compare"
    config.comparison = arg
    config.benchmarks = ("vstar",) if arg == "7b" else ("vsearch",)  # any of docs/benchmarks.md, "textvqa:ocr" too
    config.systems = ()  # rows, see evaluation/systems.py; empty: all
    config.models = ""  # folder of trained models; empty: those that ship with the package (there are no 7B ones)
    config.seeds = ()  # empty: those that `models` holds
    # Only the first so many questions of each split (vsearch: pictures); 0: all.
    config.limit = 0 if arg == "7b" else 200
    config.batch_size = 4  # changes no answer
    config.dtype = config_dict.placeholder(str)  # "float32" or "bfloat16"; None: float32 on CPU, else bfloat16
    config.passes = 5  # times that each system is timed; 0: none
    config.data_dirs = config_dict.ConfigDict(dict.fromkeys(BENCHMARKS, ""))  # benchmarks as downloaded
    # Of vsearch: which pictures, and where they are drawn to (empty: the user's data folder).
    config.vsearch = config_dict.ConfigDict({"preset": "standard", "split": "test", "seed": 0, "data_dir": ""})
    return config
