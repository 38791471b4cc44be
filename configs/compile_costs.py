"""What compile_costs.py measures; lists are written with commas.

python compile_costs.py --config=configs/compile_costs.py              7B on this CPU's and a TPU v5e's compiler
python compile_costs.py --config=configs/compile_costs.py:depth        compile time against depth, scanned and unrolled
python compile_costs.py --config=configs/compile_costs.py:ranking      ranking cells against ranking tokens
python compile_costs.py --config=configs/compile_costs.py:resolution   time and memory against the picture's size
python compile_costs.py --config=configs/compile_costs.py:cells        time against the cells that a row reads
python compile_costs.py --config=configs/compile_costs.py:train        the training step, with and without remat
python compile_costs.py --config=configs/compile_costs.py:gpu          the default's programs on an H100's compiler
python compile_costs.py --config=configs/compile_costs.py:systems      every way to read a picture that there is
python compile_costs.py --config=configs/compile_costs.py:check        programs whose time is known, on every TPU
python compile_costs.py --config=configs/compile_costs.py:tiny         a minute, to see that everything works

An axis of one entry is named in the table's title, one of several in its rows. Targets with v or tpu need
pip install --editable ".[tpu]", a100 and h100 need ".[gpu]"; neither needs the chip.
"""

from typing import Any

from ml_collections import config_dict

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "depth": {
        "systems": "lowres,flex:10%",
        "programs": "prefill",
        "depths": "4,8,16,32",
        "unrolled_time_limit": 600.0,
        "time_limit": 600.0,
    },
    "ranking": {"systems": "flex:10%", "layers": "scanned", "rankings": "cells,tokens,approximate,sort,mask"},
    "resolution": {"programs": "prefill", "layers": "scanned", "zooms": "1,2,3,4", "passes": 1, "targets": "v5e:2x2"},
    "cells": {
        "systems": "lowres,flex:4,flex:8,flex:20,flex:40,flex:all",
        "layers": "scanned",
        "passes": 1,
        "targets": "v5e:2x2",
    },
    "systems": {
        "systems": "lowres,flex:10%,flex:all,dense,cogagent,xattn,vistog:64,fastv:192,pyramiddrop:72,visionzip:64",
        "layers": "scanned",
        "passes": 1,
        "targets": "v5e:2x2",
    },
    "train": {
        "programs": "train",
        "layers": "scanned",
        "remat": "none,full,dots",
        "targets": "v5e:8x8",
        "time_limit": 600.0,
    },
    "gpu": {"targets": "h100:2", "layers": "scanned"},
    "check": {
        "programs": "matmul,attention",
        "targets": "v4:2x2x1,v5e:2x2,v5p:2x2x1,v6e:2x2",
        "layers": "scanned",
        "passes": 1,
    },
    "tiny": {
        "presets": "tiny",
        "systems": "lowres,flex:2,dense,cogagent,vistog:4,fastv:4",
        "programs": "prefill,decode,score,train",
        "targets": "cpu",
        "text": 8,
        "train_text": 32,
        "dtype": "float32",
        "passes": 1,
        "steps": 3,
    },
}


def get_config(arg: str = "default") -> config_dict.ConfigDict:
    """The settings of `compile_costs.py`; `arg` is what follows the colon in --config."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/compile_costs.py has no {arg!r}; write one of :{', :'.join(VARIANTS)}")
    config = config_dict.ConfigDict()
    config.presets = "7b"  # 7b, 13b, mini, tiny
    config.systems = "lowres,flex:10%,flex:25%,flex:all,dense"  # see SYSTEMS in flexattn_jax/costs/cases.py
    config.programs = "prefill,decode"  # also score, train; matmul and attention have no model
    config.targets = (
        "cpu,v5e:2x2"  # cpu, attached, v4: v5e: v5p: v6e: tpu7x: with a topology, a100 or h100 with a number
    )
    config.layers = "scanned,unrolled"
    config.unrolled_systems = "lowres,flex:10%"  # systems that are unrolled, too; empty: all
    config.remat = "full"  # of training: none, full, dots
    config.depths = ""  # decoder layers; empty: the preset's
    config.rankings = "cells"  # also tokens, approximate, sort, mask: see costs/rankings.py
    config.zooms = ""  # side of the picture over the low-resolution one; empty: the preset's
    config.options = ""  # compiler options, --xla_name=value, several in a set, sets divided by ;
    config.batch = 1  # samples; of training, samples a device
    config.text = 64  # positions beside the picture's slots
    config.train_text = 1472  # the same in training
    config.dtype = "bfloat16"  # of inference; training keeps its state in float32
    config.passes = 3  # readings of each case
    config.time_limit = 300.0  # seconds that a reading may take
    config.unrolled_time_limit = 60.0  # the same where layers are unrolled
    config.warm_cache = False  # compile once more from a persistent cache
    config.steps = 0  # runs to time on cpu and on what is attached
    config.update(VARIANTS[arg])
    return config
