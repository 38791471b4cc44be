"""The README's Python runs as it stands."""

import pathlib
import re

from flexattn_jax.evaluation.demo import write_random_checkpoint

ROOT = pathlib.Path(__file__).parents[1]


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    write_random_checkpoint(tmp_path / "runs" / "demo" / "checkpoint")
    (tmp_path / "flexattn_jax").symlink_to(ROOT / "flexattn_jax")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    answers, losses, shapes = capsys.readouterr().out.strip().splitlines()
    assert answers.startswith("[") and len(eval(losses)[0]) == 3 and shapes.startswith("(1, 580, 512) [")
