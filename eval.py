"""Evaluates a checkpoint on a benchmark: prints a table, writes results.json and predictions.jsonl.

python eval.py --config=configs/vstar.py:7b --config.data_dir=DIR --config.checkpoint=DIR --workdir=DIR

The same command run again goes on where a killed run stopped.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", str(pathlib.Path(__file__).parent / "configs" / "vstar.py"), "Settings, e.g. configs/vstar.py:7b."
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/vstar", "Folder for this run's predictions, results and pictures.")


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        _fail(error)


def _fail(error: BaseException | str) -> None:
    print(f"eval.py: {error}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"{argv[1]!r} is no flag; settings are written --config.NAME=VALUE")
    logging.set_verbosity(logging.WARNING)  # JAX reports every backend that it does not find
    from flexattn_jax.evaluation.run import USER_ERRORS, run_vstar

    try:
        run_vstar(_CONFIG.value.to_dict(), _WORKDIR.value)
    except USER_ERRORS as error:
        _fail(error)
    except KeyboardInterrupt:
        print("eval.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
