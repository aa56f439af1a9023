"""Regular expressions that would be matched for ever: refused, from a file as from a configuration."""

import sys

import pytest
from torch import nn

import lowrank_core
from lowrank_core import LoRA, LowrankError, UsageError, find_targets
from lowrank_core.adapters import patterns
from lowrank_core.files import read

NAME = "a" * 60
NESTED = "(a+)+!"


@pytest.fixture
def model():
    return nn.Sequential(nn.ModuleDict({NAME: nn.Linear(2, 2)}), nn.ModuleDict({"q": nn.Linear(2, 2)}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": f".*{NESTED}"},
        {"target_modules": "all-linear", "exclude_modules": ".*" * 20 + "!"},
        {"target_modules": [NAME], "rank_pattern": {NAME: 2, NESTED: 3}},
        {"target_modules": [NAME], "layers_to_transform": 0, "layers_pattern": f"0.{NESTED}"},
    ],
)
def test_a_pattern_without_an_end(model, monkeypatch, fields):
    monkeypatch.setattr(patterns, "_SECONDS", 0.5)
    field = list(fields)[-1]
    with pytest.raises(UsageError, match=rf"^{field} '.*!' takes longer than 0.5 seconds to match the .* list the nam"):
        find_targets(model, LoRA(**fields))


def test_a_pattern_without_an_end_in_a_file(model, monkeypatch, tmp_path):
    """Names and pattern are the file's own."""
    lowrank_core.save(lowrank_core.inject(model, LoRA(target_modules=[NAME])), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"alpha_pattern": {}', f'"alpha_pattern": {{"{NESTED}": 2}}'))
    monkeypatch.setattr(patterns, "_SECONDS", 0.5)
    with pytest.raises(UsageError, match=r"alpha_pattern of adapter_config.json .* takes longer than"):
        read(tmp_path / "a")


@pytest.mark.parametrize("pattern", ["(" * 5_000 + ")" * 5_000, "a{99999999999}"])
def test_patterns_that_python_compiles_to_no_end(model, pattern):
    with pytest.raises(UsageError, match=r"target_modules .* is not a regular expression: .{1,80}; mend it$"):
        find_targets(model, LoRA(target_modules=pattern))


def test_a_layers_pattern_with_a_group():
    """Its group is not the layer's number."""
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(2)])})
    config = LoRA(target_modules=["q"], layers_to_transform=[1], layers_pattern="(h|layers)")
    assert [target.name for target in find_targets(model, config)] == ["h.1.q"]


def test_no_process_to_try_a_pattern_in(model, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(LowrankError, match=r"cannot be tried out in a process of its own \(.*nowhere.*\); list the na"):
        find_targets(model, LoRA(target_modules=".*(q|nowhere)"))


def test_plain_patterns_need_no_process(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere")
    config = LoRA(target_modules=["q"], rank_pattern={"^0.q": 2, r"1\.q": 3})
    model = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(3)])
    assert [target.rank for target in find_targets(model, config)] == [2, 3, 8]
