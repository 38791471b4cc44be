"""Measures what each design costs XLA to compile, and estimates what it costs to run, with no accelerator attached.

python compile_costs.py --config=configs/compile_costs.py --workdir=DIR
python compile_costs.py --config=configs/compile_costs.py:depth --config.targets=cpu,v6e:2x2 --workdir=DIR
python compile_costs.py diff A/costs.json B/costs.json

docs/compile_costs.md says what the columns mean. The same command run again goes on where a stopped run was.
"""

import pathlib
import sys

from absl import flags

from flexattn_jax.command_line import run_command
from flexattn_jax.costs.run import USER_ERRORS, run_costs, run_diff

_CONFIG = pathlib.Path(__file__).parent / "configs" / "compile_costs.py"
_WORKDIR = flags.DEFINE_string("workdir", "runs/compile_costs", "Folder of the readings, tables and charts.")

if __name__ == "__main__":
    if sys.argv[1:2] == ["diff"]:
        sys.exit(run_diff(sys.argv[2:]))
    run_command(lambda settings: run_costs(settings, _WORKDIR.value), _CONFIG, USER_ERRORS)
