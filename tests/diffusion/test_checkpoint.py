"""Checkpoints: the bits come back, old ones go, damaged and foreign ones are refused."""

import errno
import json
import os

import pytest
import torch

from lowrank_core import LowrankError
from lowrank_diffusion.checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    named_state,
    numbered_state,
    run_digest,
    save_checkpoint,
)
from lowrank_diffusion.load import load_config

NAMES = ["unet.a", "unet.b"]


def stepped(make=torch.optim.AdamW, steps=2):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(2))]
    optimizer = make(parameters, lr=1e-2)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters, optimizer


def made(step=2, make=torch.optim.AdamW):
    parameters, optimizer = stepped(make)
    factors = {"unet/a": parameters[0].detach(), "unet/b": parameters[1].detach()}
    return Checkpoint(
        step, factors, named_state(optimizer.state_dict(), NAMES), {"unet.a": -factors["unet/a"]}
    ), optimizer


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adamax, torch.optim.SGD])
def test_state_comes_back_bit_for_bit(tmp_path, make):
    checkpoint, optimizer = made(make=make)
    save_checkpoint(tmp_path, "digest", checkpoint, keep=1)
    loaded = load_checkpoint(tmp_path, "digest")
    assert loaded.step == 2
    assert loaded.adapters.keys() == checkpoint.adapters.keys()
    assert all(torch.equal(loaded.adapters[name], tensor) for name, tensor in checkpoint.adapters.items())
    assert torch.equal(loaded.averages.pop("unet.a"), -checkpoint.adapters["unet/a"])
    assert not loaded.averages
    _, fresh = stepped(make, steps=0)
    fresh.load_state_dict(numbered_state(loaded.optimizer, NAMES))
    before, after = optimizer.state_dict(), fresh.state_dict()
    assert str(after) == str(before) or before["param_groups"][0]["params"] == after["param_groups"][0]["params"]
    for number, values in before["state"].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(after["state"][number][key]), torch.as_tensor(value))


def test_the_file_holds_tensors_by_name_and_json(tmp_path):
    from safetensors import safe_open

    save_checkpoint(tmp_path, "digest", made()[0], keep=1)
    (path,) = checkpoints(tmp_path)
    with safe_open(path, "pt") as file:
        assert "optimizer/state/unet.a/exp_avg" in file.keys()
        assert json.loads(file.metadata()["optimizer"])["param_groups"][0]["params"] == NAMES


def test_nested_state_of_a_rank_allocator_comes_back(tmp_path):
    extra = {"step": 3, "importance": {"a": torch.rand(2)}, "present": [[True, False]], "masks": [None]}
    save_checkpoint(tmp_path, "d", Checkpoint(1, {}, {"state": {}, "param_groups": [], "rank_allocator": extra}, {}), 1)
    found = load_checkpoint(tmp_path, "d").optimizer["rank_allocator"]
    assert torch.equal(found.pop("importance")["a"], extra.pop("importance")["a"])
    assert found == extra


def test_only_the_latest_are_kept(tmp_path):
    for step in (5, 10, 9_999, 10_000):
        save_checkpoint(tmp_path, "d", made(step)[0], keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00009999.safetensors", "step-00010000.safetensors"]
    assert load_checkpoint(tmp_path, "d").step == 10_000


def test_there_is_none_yet(tmp_path):
    assert load_checkpoint(tmp_path, "d") is None


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_one_is_refused_in_one_sentence(tmp_path, kept):
    save_checkpoint(tmp_path, "d", made()[0], keep=1)
    (path,) = checkpoints(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LowrankError, match=r"step-00000002.safetensors is damaged \(.*\); remove it to go on from the"):
        load_checkpoint(tmp_path, "d")


def test_another_configurations_is_refused(tmp_path):
    save_checkpoint(tmp_path, "d", made()[0], keep=1)
    with pytest.raises(LowrankError, match=r"another configuration, other pictures or another .*start a new run"):
        load_checkpoint(tmp_path, "other")


def test_a_full_disk_leaves_the_old_ones(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "d", made(1)[0], keep=1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LowrankError, match="No space left on device; free some space"):
        save_checkpoint(tmp_path, "d", made(2)[0], keep=1)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, "d").step == 1
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("train.checkpoint_every=7", True),
        ("sample.every=7", True),
        ("track.validate_every=7", True),
        ("train.lr=7", False),
        ("train.steps=7", False),
        ("seed=7", False),
        ("adapter.rank=7", False),
        ("data.flip=0.7", False),
    ],
)
def test_a_run_is_another_when_its_numbers_would_be(override, same):
    assert (run_digest(load_config(None, [override]), "p", 1) == run_digest(load_config(None), "p", 1)) is same


def test_a_run_is_another_with_other_pictures_or_processes():
    config = load_config(None)
    assert len({run_digest(config, *how) for how in (("p", 1), ("q", 1), ("p", 2))}) == 3
