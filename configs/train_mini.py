"""The small model that learns visual search on two CPU cores (docs/mini.md), stage by stage.

python train.py --config=configs/train_mini.py:tower       --workdir=runs/mini/tower     tower and connector
python train.py --config=configs/train_mini.py:tower,more  --workdir=runs/mini/tower-more     and from more pictures
    --config.start.checkpoint=runs/mini/tower/model
python train.py --config=configs/train_mini.py:flex,find   --workdir=runs/mini/flex-find   look a name up in every cell
    --config.start.checkpoint=runs/mini/tower-more/model
python train.py --config=configs/train_mini.py:flex,both   --workdir=runs/mini/flex-both   or at low resolution alone
    --config.start.checkpoint=runs/mini/flex-find/model
python train.py --config=configs/train_mini.py:flex,small  --workdir=runs/mini/flex-small    smaller objects too
    --config.start.checkpoint=runs/mini/flex-both/model
python train.py --config=configs/train_mini.py:flex        --workdir=runs/mini/flex        questions, selected cells
    --config.start.checkpoint=runs/mini/flex-small/model

In place of flex: `twin` (low resolution alone), and other ways to read a picture (docs/systems.md): `xattn`
(LLaVA-XAttn), `vistog` (16 tokens). `released` (a cell may be read again), `all` (every cell is read), `random` (random
cells are) and `dense` (LLaVA-1.5-HD) go on from flex,small: until then every cell is read, and all five are one model.
"""

from ml_collections import config_dict

LOWRES = {"flexattention": {"enabled": False}}
ARMS = {  # how pictures are read; the tower reads them whole, so that there is one tile
    "flex": {"flexattention": {"selector": "attention", "revisit": False}},  # each layer reads cells that are new
    "released": {"flexattention": {"selector": "attention", "revisit": True}},
    "all": {"flexattention": {"selector": "all"}},
    "random": {"flexattention": {"selector": "random", "revisit": False}},
    "twin": LOWRES,
    "dense": LOWRES | {"dense": {"tiles": 1}},
    "xattn": LOWRES | {"crossattention": {"tiles": 1, "width": 96, "num_heads": 4, "source": "connector"}},
    "vistog": LOWRES | {"grouping": {"groups": 16}},
}
# Whose parts before the answers are theirs, too. Those of `dense` would be: they would take it hours, and all cells are
# read in flex's; it leaves the projections for cells out, and the sequence's own take their place.
BEGUN_AS = dict.fromkeys(("released", "all", "random", "dense"), "flex")
TRAINABLE = {"xattn": "decoder,highres", "vistog": "decoder,grouping"}  # the connector is the tower's and stays

# What each part learns from. Search is learned where one look is enough: in captions, where an object's colour, or
# its column, follows its name. So are sides, which take two looks and come late in questions alone. High resolution
# comes first, since it shows names best; then low resolution is alone in many of the samples, since its map is what
# selects. What is selected is read last, when it answers questions.
QUESTIONS = {"presets": ("standard", "crowded"), "questions": True, "text_lengths": (216,), "answer_rows": (40,)}
CAPTIONS = {"questions": False, "captions": 4, "columns": 1, "sides": 1, "text_lengths": (88,), "answer_rows": (18,)}
TOWER = {
    "tower": QUESTIONS,
    "more": QUESTIONS | {"seed": 1, "pictures": 4000},  # the first 3000 it then knows by heart
}
PARTS = {
    "find": CAPTIONS | {"presets": ("crowded",), "captions": 6, "columns": 0, "sides": 0},
    "both": CAPTIONS | {"presets": ("large", "crowded")},
    "small": CAPTIONS | {"presets": ("standard", "crowded")},
    "answers": QUESTIONS | {"captions": 2, "columns": 1},
}
DROPOUT = {"both": 0.5, "small": 0.3, "answers": 0.2}  # share of samples that read low resolution alone
EPOCHS = {"tower": 4.0, "more": 4.8, "find": 4.5, "both": 2.5, "small": 1.4, "answers": 3.6}
GROUNDING = 1.0  # weight of a loss on the maps that select, where they do
LEARNING_RATE = {"tower": 2e-3, "more": 1.5e-3, "answers": 1.2e-3}  # others: 1e-3


def get_config(arg: str = "flex") -> config_dict.ConfigDict:
    """The settings of `train.py`; `arg` is what follows the colon in --config."""
    arm, _, part = arg.partition(",")
    tower = arg in ("tower", "tower,more")
    part = part or ("tower" if tower else "answers")
    if not tower and (arm not in ARMS or part not in PARTS):
        raise ValueError(
            f"configs/train_mini.py has no {arg!r}; write :tower, :tower,more or one of :{', :'.join(ARMS)}, alone "
            f"or followed by one of ,{' ,'.join(PARTS)}"
        )
    if part != "answers" and arm in BEGUN_AS:
        raise ValueError(
            f"there is no :{arg}; until then {arm} is one model with {BEGUN_AS[arm]}: write :{BEGUN_AS[arm]},{part}"
        )
    model = dict(ARMS.get(arm, {"flexattention": {}}))
    selector = model["flexattention"].get("selector")
    if not tower and model["flexattention"].get("enabled", True):
        every = {"selector": "all"} if part != "answers" else {}
        model["flexattention"] = model["flexattention"] | every | {"dropout": DROPOUT.get(part, 0.0)}
    config = config_dict.ConfigDict()
    config.task = "search"
    config.stage = "tower" if tower else "answers"
    config.start = config_dict.ConfigDict(
        {
            "checkpoint": "",  # the stage before, WORKDIR/model
            "vision_tower": "",
            "preset": "mini" if part == "tower" else "",
            "tokenizer": "",  # tower: vsearch's words
            "draw_by_width": True,  # from the N(0, 0.02) of large models it learns nothing for a thousand steps
            "redraw": "decoder" if part == "find" else "",  # by the seed; the tower's stage drew it too
            "copy_projections": part == "find",
            "read_highres": True,
            "dtype": config_dict.placeholder(str),
        }
    )
    config.data = config_dict.ConfigDict(
        {
            "pictures": 3000,
            "captions": 0,
            "columns": 0,
            "sides": 0,
            "seed": 0,
            "grounding": GROUNDING if part == "answers" and selector == "attention" else 0.0,
            "data_dir": "",
            "keep_views": True,
            "eval_samples": 128,
            "window": 1,
        }
        | (TOWER | PARTS)[part]
    )
    config.tower = config_dict.ConfigDict({"crops": 3, "crop_side": 96})
    config.optimizer = config_dict.ConfigDict(
        {
            "trainable": "vision,connector,probe" if tower else TRAINABLE.get(arm, "decoder"),
            "learning_rate": LEARNING_RATE.get(part, 1e-3),
            "schedule": "cosine" if tower or part == "answers" else "constant",
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
    config.epochs = EPOCHS[part]
    config.seed = 0
    config.export = "last"
    config.export_dtype = "float32"
    config.model = config_dict.ConfigDict(model)
    config.loop = config_dict.ConfigDict(
        {
            "log_every": 50,
            "eval_every": 250,
            "save_every": 250,
            "keep": 2,
            "max_bad_steps": 10,
            "profile_steps": "",
            "pictures": 4,
            "threads": 2,
            "read_ahead": 2,
        }
    )
    return config
