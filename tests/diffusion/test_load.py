"""Configurations of fine-tuning runs: presets, overrides, flags, and what is wrong with them."""

import pytest

from lowrank_core import UsageError
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.load import load_config
from lowrank_diffusion.presets import presets

METHODS = {"sdxl-lora": "lora", "sdxl-loha": "loha", "sdxl-lokr": "lokr", "sdxl-adalora": "adalora"}


def test_every_preset_is_valid_and_has_its_name():
    assert list(presets()) == ["quickstart", *sorted([*METHODS, "sdxl-blora", "sdxl-dreambooth"])]
    for name, line in presets().items():
        assert load_config(name).name == name
        assert 20 < len(line) < 130


@pytest.mark.parametrize(("name", "method"), METHODS.items())
def test_presets_are_named_after_their_method(name, method):
    config = load_config(name)
    assert config.adapter.method == method
    # The original pictures of diffengine's recipe have been withdrawn.
    assert config.data.path == "lambdalabs/naruto-blip-captions"


def test_without_a_source_it_is_the_quickstart_on_the_tiny_sdxl():
    config = load_config(None)
    assert (config.name, config.base.path, config.data.path) == ("quickstart", "tiny", "quickstart")


def test_flags_win_over_overrides_and_those_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\ntrain: {steps: 5, lr: 1e-4}\nadapter: {method: lokr}\n")
    overrides = ["seed=2", "train.steps=6", "train.processes=2", "adapter.target=[to_q]"]
    config = load_config(str(tmp_path / "run.yaml"), overrides, seed=3, processes=4)
    assert (config.seed, config.train.steps, config.train.processes) == (3, 6, 4)
    assert (config.train.lr, config.adapter.method, config.adapter.target) == (1e-4, "lokr", ["to_q"])
    assert load_config(str(tmp_path / "run.yaml"), overrides).seed == 2


def test_all_faults_are_reported_together():
    with pytest.raises(UsageError, match=r"2 faults .*unknown key 'train.stpes' \(nearest: train.steps.*adapter.rank"):
        load_config(None, ["train.stpes=3", "adapter.rank=0"])


def test_a_mapping_of_patterns_is_a_value_and_no_section():
    overrides = ["adapter.rank_pattern={'up_blocks.0.*': 4}", "adapter.alpha_pattern={to_q: 2}"]
    settings = load_config(None, overrides).adapter
    assert (settings.rank_pattern, settings.alpha_pattern) == ({"up_blocks.0.*": 4}, {"to_q": 2.0})
    with pytest.raises(UsageError, match=r"adapter.rank_pattern.to_q: .*greater than 0, got 0"):
        load_config(None, ["adapter.rank_pattern={to_q: 0}"])
    with pytest.raises(UsageError, match=r"unknown key 'adapter.rank.to_q'"):
        load_config(None, ["adapter.rank={to_q: 0}"])


def test_an_unknown_preset_names_the_nearest_and_the_command_that_lists_them():
    with pytest.raises(UsageError, match=r"no preset 'sdxl-lohra'; nearest: sdxl-.*lowrank diffusion presets"):
        load_config("sdxl-lohra")


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b"])
def test_a_name_that_is_no_files_name_is_refused(name):
    with pytest.raises(UsageError, match=r"name: string should match pattern"):
        load_config(None, [f"name={name!r}"])


def test_a_dumped_configuration_is_the_same_again(tmp_path):
    import yaml

    config = load_config("sdxl-adalora")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(tmp_path / "config.yaml")) == config == DiffusionConfig(**config.model_dump())
