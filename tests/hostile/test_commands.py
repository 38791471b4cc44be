"""The real commands with flags, config files and folders that cannot be: exit code 2 and one sentence, no trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.checks import one_sentence, vstar_folder

from flexattn_jax.command_line import _check_cache
from flexattn_jax.files import FileError

ROOT = Path(__file__).parents[2]

CONFIGS = {
    "syntax": "def get_config(:\n",
    "import": "import nosuch\n",
    "no function": "x = 1\n",
    "raises": "def get_config():\n    return 1 / 0\n",
    "a key": "def get_config():\n    return {}['a']\n",
    "nothing": "def get_config():\n    return None\n",
    "another's": "from ml_collections import config_dict\n"
    "def get_config():\n    return config_dict.ConfigDict({'a': 1})\n",
    "half": "from ml_collections import config_dict\n"
    "def get_config():\n    return config_dict.ConfigDict({'benchmark': 'vstar', 'task': 'llava'})\n",
}
SCRIPTS = ("eval.py", "train.py", "compile_costs.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{(script, arguments): (exit code, output, errors)} of all cases."""
    folder = tmp_path_factory.mktemp("commands")
    data = vstar_folder(folder / "data")
    for name, text in CONFIGS.items():
        (folder / f"{name}.py").write_text(text)
    cases = [(script, [f"--config={folder / name}.py"]) for script in SCRIPTS for name in CONFIGS]
    for script in SCRIPTS:
        for arguments in (
            ["--config=nowhere.py"], ["--config="], ["--config=README.md"], ["--config=configs"], ["--confg=x"],
            ["--config.nosuch=1"], ["nonsense"], ["--config=/dev/null"],
        ):  # fmt: skip
            cases.append((script, arguments))
    cases += [
        ("eval.py", ["--config=configs/train_llava.py"]),
        ("eval.py", ["--config=configs/compile_costs.py"]),
        ("eval.py", ["--config=configs/vstar.py:nosuch"]),
        ("eval.py", ["--config=configs/textvqa.py:nosuch"]),
        ("eval.py", ["--config.batch_size=many"]),
        ("eval.py", ["--config.batch_size=1.5"]),
        ("eval.py", ["--config=configs/vstar.py:7b"]),
        ("eval.py", ["--config=configs/vstar.py:7b", f"--config.data_dir={data}", "--config.checkpoint=/"]),
        ("eval.py", ["--config=configs/vstar.py:7b", f"--config.data_dir={data}", f"--config.checkpoint={folder}"]),
        ("eval.py", ["--config=configs/vstar.py:7b", f"--config.data_dir={data / 'x'}"]),
        ("eval.py", ["--config=configs/vstar.py:mini", "--config.models=nosuch"]),
        ("train.py", ["--config=configs/vstar.py"]),
        ("train.py", ["--config=configs/train_llava.py"]),
        ("train.py", ["--config.start.checkpoint=/nowhere", "--config.data.conversations=/nowhere"]),
        ("train.py", ["--config.optimizer.learning_rate=nan", *_train(folder)]),
        ("train.py", ["--config.batch_size=0", *_train(folder)]),
        ("train.py", ["--config.seed=100000000000000000000000", *_train(folder)]),
        ("train.py", ["--config.model.decoder.max_positions=0", *_train(folder)]),
        ("train.py", [*_train(folder), "--config.data.conversations=/dev/zero"]),
        ("train.py", [*_train(folder), "--workdir=/proc/x"]),
        ("compile_costs.py", ["--config=configs/vstar.py"]),
        ("compile_costs.py", ["--config.targets=v99:1"]),
        ("compile_costs.py", ["--config.batch=0", f"--workdir={folder}/c"]),
        ("compile_costs.py", ["--config.depths=1000000000", f"--workdir={folder}/c"]),
        ("compile_costs.py", ["--config.zooms=1000000000", f"--workdir={folder}/c"]),
        ("compile_costs.py", ["--config=configs/compile_costs.py:tiny", "--workdir=/proc/x"]),
        ("compile_costs.py", ["diff", "/nowhere/a.json", "/dev/zero"]),
        ("compile_costs.py", ["diff", str(folder / "syntax.py"), str(folder / "syntax.py")]),
        ("compile_costs.py", ["diff"]),
    ]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "commands.py"],
        input=json.dumps(cases),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(zip(cases, json.loads(done.stdout), strict=True))


def _train(folder: Path) -> list[str]:
    conversations = folder / "c.json"
    conversations.write_text("[]")
    (folder / "checkpoint").mkdir(exist_ok=True)
    return [
        f"--config.start.checkpoint={folder / 'checkpoint'}",
        f"--config.data.conversations={conversations}",
        f"--config.data.pictures={folder}",
        f"--workdir={folder / 'w'}",
    ]


def test_every_mistake_is_one_sentence(outcomes):
    for (script, arguments), (code, out, errors) in outcomes:
        case = f"{script} {' '.join(arguments)}: {code}\n{out}\n{errors}"
        assert code == 2, case
        sentences = [line for line in errors.splitlines() if line.startswith(f"{script}: ")]
        assert len(sentences) == 1 and one_sentence(sentences[0]) and "Traceback" not in errors, case


def test_the_sentence_names_what_is_wrong(outcomes):
    printed = {(script, *arguments): errors for (script, arguments), (_, _, errors) in outcomes}
    assert "'nowhere.py' cannot be read" in printed["eval.py", "--config=nowhere.py"]
    assert "no setting 'nosuch'" in printed["train.py", "--config.nosuch=1"]
    assert "no setting 'task'" in printed["train.py", "--config=configs/vstar.py"]
    assert "no setting 'benchmark'" in printed["eval.py", "--config=configs/train_llava.py"]
    assert "'nonsense' is no flag" in printed["compile_costs.py", "nonsense"]


def test_a_cache_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    _check_cache()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(FileError, match=r"JAX_COMPILATION_CACHE_DIR=.*a folder of yours"):
        _check_cache()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    _check_cache()
