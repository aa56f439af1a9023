"""`lowrank doctor`: what it finds here, and what it says where something is missing."""

import json
import shutil
import sys
from collections import namedtuple
from importlib.metadata import version

import pytest

from lowrank_cli import examining

Usage = namedtuple("Usage", "total used free")


def test_as_json(lowrank):
    outcome = lowrank("doctor", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert found["packages"]["torch"] == version("torch")
    assert found["devices"][0]["name"] == "cpu"
    assert set(found["extras"]) == {"fl", "diffusion", "privacy", "quantize", "serve"}
    assert {"python", "platform", "cores", "threads", "disk", "shared_memory", "folders", "checks"} <= found.keys()
    assert all(check["outcome"] in ("ok", "warning") for check in found["checks"])


def test_as_text(lowrank):
    text = lowrank("doctor").out
    for heading in ("Versions:", "Extras:", "Devices:", "Machine:", "Folders:"):
        assert f"{heading}\n" in text
    assert f"  flwr               {version('flwr')}\n" in text
    assert "ok       torch: it is imported\n" in text


def test_without_torch_it_fails_and_says_how_to_get_it(lowrank, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = lowrank("doctor")
    assert outcome.code == 1
    assert "missing  torch: it cannot be imported (import of torch halted" in outcome.out
    assert "install it again: pip install torch" in outcome.out


def test_an_extra_that_is_not_installed(lowrank, monkeypatch):
    real = examining.version

    def without(name):
        if name == "diffusers":
            raise examining.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(examining, "version", without)
    outcome = lowrank("doctor")
    assert outcome.code == 0
    assert (
        'warning  extra diffusion: diffusers not installed; get it with: pip install "lowrank[diffusion]"'
        in outcome.out
    )
    assert not json.loads(lowrank("doctor", "--json").out)["extras"]["diffusion"]


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (2**20, ["warning  disk: 0.0 GiB free here; give --out", "warning  shared memory: 0.0 GiB free in /dev/shm"]),
        (2**40, ["ok       disk: 1024.0 GiB free here"]),
    ],
)
def test_disk_and_shared_memory(lowrank, monkeypatch, free, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    monkeypatch.setattr(examining.Path, "is_dir", lambda path: True)
    text = lowrank("doctor").out
    assert all(each in text for each in words)


def test_folders_that_cannot_be_written_to(lowrank, monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "below" / "cache"))
    monkeypatch.setattr(examining.os, "access", lambda path, mode: path != tmp_path)
    assert f"warning  lowrank cache: {tmp_path}/below/cache cannot be written to" in lowrank("doctor").out
