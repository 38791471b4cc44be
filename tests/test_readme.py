"""The README's Python runs as it stands."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "flexattn_jax").symlink_to(ROOT / "flexattn_jax")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    answers, losses, shapes = capsys.readouterr().out.strip().splitlines()
    assert eval(answers)[0] == "The color of the butterfly is orange." and len(eval(losses)[0]) == 4
    assert shapes.startswith("(1, 40, 128) [4 4 4 4]")
