"""The one table of FlexAttention's settings that the commands share."""

import importlib.util
from pathlib import Path

import pytest

from flexattn_jax.config import FlexAttentionConfig, dotted
from flexattn_jax.overrides import INFERENCE, TRAINING, flexattention_overrides

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("names", [INFERENCE, TRAINING])
def test_every_setting_exists_starts_unset_and_takes_its_type(names):
    table = flexattention_overrides(names)
    assert list(table) == sorted(names) and dotted(table.to_dict()) == {}
    defaults = FlexAttentionConfig()
    for name in names:
        value = getattr(defaults, name)
        table[name] = 3 if value is None else value
        with pytest.raises(TypeError):
            table[name] = [1]
    assert FlexAttentionConfig(**table.to_dict()).threshold == defaults.threshold


def _config(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("config, names", [("train_llava", TRAINING), ("vstar", INFERENCE), ("textvqa", INFERENCE)])
def test_configs_use_it(config, names):
    settings = _config(config)
    table = (settings.model if config.startswith("train") else settings.model_overrides).flexattention
    assert set(table) == set(names)


@pytest.mark.parametrize("config, name", [("train_llava", "model"), ("vstar", "model_overrides")])
def test_sizes_of_configs_start_unset_and_take_their_type(config, name):
    table = _config(config)[name]
    assert dotted(table.to_dict()) == ({"remat": "dots"} if name == "model" else {})
    table.image_size = 480
    for wrong in ("7", [7]):
        with pytest.raises(TypeError):
            table.image_size = wrong
