"""The small model that learns visual search on two CPU cores (docs/mini.md), stage by stage.

python train.py --config=configs/train_mini.py:tower    --workdir=runs/mini/tower       the tower, from nothing
python train.py --config=configs/train_mini.py:captions --workdir=runs/mini/captions    connector and decoder: captions
    --config.start.checkpoint=runs/mini/tower/model
python train.py --config=configs/train_mini.py:lowres   --workdir=runs/mini/lowres      LLaVA-1.5: low resolution alone
    --config.start.checkpoint=runs/mini/captions/model
python train.py --config=configs/train_mini.py:flex     --workdir=runs/mini/flex        FlexAttention, from there
    --config.start.checkpoint=runs/mini/lowres/model

In place of flex: `twin` (low resolution goes on alone), `all` (every cell is read), `random` (random cells are), and
other ways to read a picture (docs/systems.md): `dense` (LLaVA-1.5-HD), `xattn` (LLaVA-XAttn), `vistog` (16 tokens).
"""

from ml_collections import config_dict

LOWRES = {"flexattention": {"enabled": False}}
ARMS = {  # how pictures are read; the tower reads them whole, so that there is one tile
    "captions": LOWRES,
    "lowres": LOWRES,
    "twin": LOWRES,
    "dense": LOWRES | {"dense": {"tiles": 1}},
    "xattn": LOWRES | {"crossattention": {"tiles": 1, "width": 96, "num_heads": 4, "source": "connector"}},
    "vistog": LOWRES | {"grouping": {"groups": 16}},
    "flex": {"flexattention": {}},
    "all": {"flexattention": {"selector": "all"}},
    "random": {"flexattention": {"selector": "random"}},
}
TRAINABLE = {
    "tower": "vision,probe",
    "xattn": "connector,decoder,highres",
    "vistog": "connector,decoder,grouping",
}

# What each stage learns from. Search is learned first where it is easy: from objects that low resolution shows, and
# from captions, in which an object's colour follows its name, so that one look into the picture tells it.
QUESTIONS = {"presets": ("standard", "crowded"), "text_lengths": (172,), "answer_rows": (80,)}
DATA = {
    "tower": QUESTIONS | {"pictures": 6000},
    "captions": {
        "presets": ("large",),
        "questions": False,
        "captions": 6,
        "text_lengths": (88,),
        "answer_rows": (18,),
    },
    "lowres": {
        "presets": ("large", "standard", "crowded"),
        "captions": 2,
        "text_lengths": (200,),
        "answer_rows": (86,),
    },
}
EPOCHS = {"tower": 3.0, "captions": 1.6}


def get_config(arg: str = "flex") -> config_dict.ConfigDict:
    """The settings of `train.py`; `arg` is what follows the colon in --config."""
    if arg != "tower" and arg not in ARMS:
        raise ValueError(f"configs/train_mini.py has no {arg!r}; write :tower or one of :{', :'.join(ARMS)}")
    tower = arg == "tower"
    config = config_dict.ConfigDict()
    config.task = "search"
    config.stage = "tower" if tower else "answers"
    config.start = config_dict.ConfigDict(
        {
            "checkpoint": "",  # the stage before, WORKDIR/model
            "vision_tower": "",
            "preset": "mini" if tower else "",
            "tokenizer": "",  # tower: vsearch's words
            "draw_by_width": True,  # from the N(0, 0.02) of large models it learns nothing for a thousand steps
            "redraw": "connector,decoder" if arg == "captions" else "",
            # What low resolution is searched for by then, high resolution is searched for from the start.
            "copy_projections": arg not in ("tower", "captions", "lowres"),
            "read_highres": True,
            "dtype": config_dict.placeholder(str),
        }
    )
    config.data = config_dict.ConfigDict(
        {
            "pictures": 4000,
            "questions": True,
            "captions": 0,
            "seed": 0,
            "data_dir": "",
            "keep_views": True,
            "eval_samples": 128,
            "window": 1,
        }
        | DATA.get(arg, QUESTIONS)
    )
    config.tower = config_dict.ConfigDict({"crops": 3, "crop_side": 96})
    config.optimizer = config_dict.ConfigDict(
        {
            "trainable": TRAINABLE.get(arg, "connector,decoder"),
            "learning_rate": 2e-3 if tower else 1.5e-3,
            "schedule": "constant" if arg == "captions" else "cosine",
            "warmup_share": 0.05,
            "b1": 0.9,
            "b2": 0.98,
            "eps": 1e-8,
            "weight_decay": 0.02,
            "clip_norm": 1.0,
            "ema_decay": config_dict.placeholder(float),
        }
    )
    config.batch_size = 16
    config.accumulation = 1
    config.epochs = EPOCHS.get(arg, 1.0)
    config.seed = 0
    config.export = "last"
    config.export_dtype = "float32"
    config.model = config_dict.ConfigDict(ARMS.get(arg, {"flexattention": {}}))
    config.loop = config_dict.ConfigDict(
        {
            "log_every": 50,
            "eval_every": 500,
            "save_every": 500,
            "keep": 2,
            "max_bad_steps": 10,
            "profile_steps": "",
            "pictures": 4,
            "threads": 2,
            "read_ahead": 2,
        }
    )
    return config
