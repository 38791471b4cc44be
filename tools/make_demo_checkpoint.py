"""Writes the demo's small checkpoint of random weights, in the layout of the published FlexAttention checkpoint.

python tools/make_demo_checkpoint.py --out=runs/demo/source
python -m flexattn_jax.checkpoints.import_weights --source runs/demo/source --out runs/demo/checkpoint
python eval.py --config=configs/vstar.py --config.checkpoint=runs/demo/checkpoint --workdir=runs/demo/vstar
"""

from absl import app, flags

from flexattn_jax.evaluation.demo import is_random, write_random_checkpoint

_OUT = flags.DEFINE_string("out", "runs/demo/source", "Folder to write.")


def main(_) -> None:
    if is_random(_OUT.value):
        print(f"{_OUT.value} is there already")
        return
    write_random_checkpoint(_OUT.value)
    print(f"wrote random weights to {_OUT.value}: answers given with them mean nothing")


if __name__ == "__main__":
    app.run(main)
