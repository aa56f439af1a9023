"""Rows and grids where `track.wandb` sends them, in the service's offline form, which is read back."""

import json

import pytest
from PIL import Image

from lowrank_core import LowrankError
from lowrank_diffusion.load import load_config
from lowrank_diffusion.results import StepRow
from lowrank_diffusion.tracking import check_trackers, tracked

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """No key and no settings of whoever runs the tests, and a server that nobody is."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield
    wandb.teardown()


def records(folder):
    """What the offline runs below a run's folder hold, the earliest first.

    The service's own reader is no Python; the file is LevelDB's log behind seven bytes: blocks of 32 KiB, in them
    pieces with checksum (4 bytes), length (2) and kind (1), whose kinds 1 and 4 end a record.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # Only then all of it is written.
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        content, place, record = file.read_bytes(), 7, b""
        assert content[:4] == b":W&B"
        while place + 7 <= len(content):
            if (left := 2**15 - place % 2**15) < 7:
                place += left
                continue
            size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
            record += content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):
                yield Record.FromString(record)
                record = b""


def row(step: int) -> StepRow:
    return StepRow(step, 1 / step, 1e-4, 2.5, 10**9, 0.1, 0.75 if step == 2 else None)


def values(record) -> dict:
    return {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}


@pytest.mark.slow
def test_a_run_that_is_resumed_is_one_run_there(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_config(None, ["track.wandb=true", "track.project=pets", "name=rex", "data.path=/home/me/rex"])
    check_trackers(config.track)
    notes = []
    for steps in ((1, 2), (3,)):
        with tracked(tmp_path, config, notes.append) as trackers:
            for step in steps:
                trackers.row(row(step))
                trackers.samples(step, Image.new("RGB", (8, 4), (9 * step, 0, 0)))
    found = list(records(tmp_path))
    begun = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.display_name) for run in begun} == {
        ((tmp_path / "wandb-id").read_text().strip(), "pets", "rex")
    }
    sent = {item.key: json.loads(item.value_json) for item in begun[0].config.update}
    assert (sent["name"], sent["data"]["path"]) == ("rex", "rex")
    told = [values(record) for record in found if record.WhichOneof("record_type") == "history"]
    keys = ("_step", "loss", "lr", "images_per_second", "peak_memory_bytes")
    assert [tuple(each[key] for key in keys) for each in told] == [
        (step, 1 / step, 1e-4, 2.5, 10**9) for step in (1, 2, 3)
    ]
    assert [each.get("validation_loss") for each in told] == [None, 0.75, None]
    pictures = [
        Image.open(next((tmp_path / "wandb").glob(f"offline-run-*/files/{each['samples.path']}"))) for each in told
    ]
    assert [(each.size, each.getpixel((0, 0))[0]) for each in pictures] == [((8, 4), 9 * step) for step in (1, 2, 3)]
    assert notes == []


@pytest.mark.slow
def test_without_a_login_nothing_begins(monkeypatch):
    track = load_config(None, ["track.wandb=true"]).track
    with pytest.raises(LowrankError, match=r"track.wandb needs a login .* \(there is no key\); run wandb login, set W"):
        check_trackers(track)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(LowrankError, match=r"track.wandb needs a login .*API key must have 40"):
        check_trackers(track)
    pytest.importorskip("wandb").teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(track)


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_diffusion.weights_and_biases._PATIENCE", 1)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    config = load_config(None, ["track.wandb=true"])
    notes = []
    with tracked(tmp_path, config, notes.append) as trackers:
        trackers.row(row(1))
    assert notes[0].startswith("Weights & Biases cannot be reached (")
    assert "the run is kept offline, and wandb sync" in notes[0]
    told = [values(record) for record in records(tmp_path) if record.WhichOneof("record_type") == "history"]
    assert [each["loss"] for each in told] == [1.0]
