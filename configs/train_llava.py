"""LLaVA-1.5's training with FlexAttention's recipe, on conversations in LLaVA's format.

python train.py --config=configs/train_llava.py            instruction tuning: decoder, connector, projections
python train.py --config=configs/train_llava.py:align      alignment: the connector alone, low resolution only

VisToG (docs/systems.md) in two stages, the second from the model of the first:

python train.py --config=configs/train_llava.py:vistog_align    semantic tokens, grouping layer, connector
python train.py --config=configs/train_llava.py:vistog          those and the decoder

Give with each --config.start.checkpoint=DIR --config.data.conversations=FILE --config.data.pictures=DIR
"""

from ml_collections import config_dict

from flexattn_jax.overrides import TRAINING, system_overrides
from flexattn_jax.partitioning import RULES

STAGES = ("instruct", "align", "vistog_align", "vistog")


def get_config(arg: str = "instruct") -> config_dict.ConfigDict:
    """The settings of `train.py`; `arg` is what follows the colon in --config."""
    if arg not in STAGES:
        raise ValueError(f"configs/train_llava.py has no {arg!r}; write :{', :'.join(STAGES[:-1])} or :{STAGES[-1]}")
    align, grouping = arg.endswith("align"), arg.startswith("vistog")
    config = config_dict.ConfigDict()
    config.task = "llava"
    config.start = config_dict.ConfigDict(
        {
            # An imported checkpoint, or published safetensors such as liuhaotian/llava-v1.5-7b, which then gets
            # high-resolution projections drawn from N(0, 0.02) as in the released recipe.
            "checkpoint": "",
            "vision_tower": "",  # folder of the CLIP tower where the published weights do not hold it
            "preset": "",  # instead of a checkpoint: random parameters of a preset ("tiny", "7b", ...)
            "tokenizer": "",  # folder of the tokeniser; empty: the checkpoint's
            "redraw": "connector" if align else "",  # parameters that begin anew: beginnings of their paths, by comma
            "copy_projections": False,  # the released recipe draws high-resolution keys' and values' weights
            "read_highres": not (align or grouping),
            "dtype": config_dict.placeholder(str),  # of the computation; None: float32 on CPU, else bfloat16
        }
    )
    config.data = config_dict.ConfigDict(
        {
            "conversations": "",  # llava_v1_5_mix665k.json; align: blip_laion_cc_sbu_558k.json
            "pictures": "",
            "follow_links": False,  # whether links may lead out of the folder of pictures
            "max_length": 2048,  # positions, the picture's 576 included, that a conversation is cut to
            # Static sizes; every pair that is met compiles one program. T is 576 more.
            "text_lengths": (64, 128, 256, 512, 1024, 1472),
            "answer_rows": (64, 256, 1472),
            "eval_samples": 256,  # held out of training
            "window": 64,  # batches that are sorted by length together
        }
    )
    config.optimizer = config_dict.ConfigDict(
        {
            "trainable": ("grouping," if grouping else "") + ("connector" if align else "connector,decoder"),
            "learning_rate": 1e-3 if align else 2e-5,
            "schedule": "cosine",  # or "constant"
            "warmup_share": 0.03,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "ema_decay": config_dict.placeholder(float),  # None: no moving average
        }
    )
    # Where parameters and samples lie (docs/pods.md); on one device there is nothing to choose. A size that is None is
    # the preset's, one may be -1: the devices that are left. Samples are split over slice, data and fsdp; where there
    # are more devices than samples to divide, preset "fsdp" splits heads, too.
    config.partition = config_dict.ConfigDict(
        {
            "preset": "fsdp",  # or "data" (parameters whole on every device), "fsdp_tensor" (heads over 2 devices, too)
            "slice": config_dict.placeholder(int),  # slices of a pod, joined by a slower network
            "data": config_dict.placeholder(int),
            "fsdp": config_dict.placeholder(int),
            "tensor": config_dict.placeholder(int),
            "rules": RULES,  # "logical axis=mesh axes"
            "largest_replicated": 1 << 22,  # numbers in a parameter that may lie whole on every device
        }
    )
    config.batch_size = 256 if align else 384  # of all devices together
    config.accumulation = 1  # parts that a batch is cut into to save memory
    config.epochs = 1.0
    config.seed = 3407
    config.export = "last"  # or "best"
    config.export_dtype = "float32"  # or "bfloat16"
    # What to change in the checkpoint's own configuration; None leaves a setting as it is.
    config.model = system_overrides(TRAINING)
    config.model.scan_layers = config_dict.placeholder(bool)
    config.model.remat = "dots"  # or "full" (less memory), "none"
    if grouping:
        config.model.grouping.groups = 64  # or 144, 256
    config.loop = config_dict.ConfigDict(
        {
            "log_every": 10,
            "eval_every": 200,
            "save_every": 200,
            "keep": 2,
            "max_bad_steps": 10,
            "profile_steps": "",  # "a:b": a profile of these steps in workdir/profile
            "pictures": 4,
            "threads": 8,
            "read_ahead": 2,
        }
    )
    return config
