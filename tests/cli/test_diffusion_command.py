"""`lowrank diffusion`, as its users see it."""

import json
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-c", "from lowrank_cli.main import main; main()", "diffusion", "train"]
KEYS = {"run_dir", "steps", "loss", "images_per_second", "peak_memory_bytes", "trainable_params"}


def test_presets_are_listed(lowrank):
    listed = json.loads(lowrank("diffusion", "presets", "--json").out)["presets"]
    assert [preset["name"] for preset in listed][:2] == ["quickstart", "sdxl-adalora"]
    assert "quickstart" in lowrank("diffusion", "presets").out


def test_resume_goes_with_nothing_else(lowrank, tmp_path):
    outcome = lowrank("diffusion", "train", "--resume", str(tmp_path), "--seed", "3")
    assert outcome.code == 2
    assert "--resume takes everything from its folder" in outcome.err


def test_faults_of_a_configuration_exit_with_2(lowrank):
    outcome = lowrank("diffusion", "train", "-o", "train.stpes=3")
    assert (outcome.code, outcome.out) == (2, "")
    assert "unknown key 'train.stpes' (nearest: train.steps" in outcome.err


@pytest.mark.slow
def test_a_plan_has_the_keys_of_a_run_and_trains_nothing(lowrank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = lowrank("diffusion", "train", "sdxl-loha", "--plan", "--json", "--quiet")
    planned = json.loads(outcome.out)
    assert planned.keys() >= KEYS
    assert (planned["steps"], planned["trainable_params"], planned["loss"]) == (4000, 23_224_320, None)
    assert outcome.err == ""
    table = lowrank("diffusion", "train", "sdxl-loha", "--plan").out
    assert "23,224,320" in table
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_run_killed_by_the_system_goes_on_with_the_same_losses(tmp_path, monkeypatch):
    from lowrank_diffusion.tiny.pretrain import untrained

    # On a busy machine threads wait for each other.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    untrained().save_pretrained(tmp_path / "base")
    small = ["data.resolution=32", "data.max_images=4", "adapter.target=[to_q]", "sample.prompts=[]", "train.steps=15"]
    settings = [f"base.path={tmp_path / 'base'}", "train.device=cpu", "train.checkpoint_every=2", *small]
    options = [part for setting in settings for part in ("-o", setting)]

    def losses(run):
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    process = subprocess.Popen([*COMMAND, *options, "--out", str(tmp_path / "killed"), "--quiet"])
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses(tmp_path / "killed")) < 15
    went_on = subprocess.run([*COMMAND, "--resume", str(tmp_path / "killed"), "--json"], capture_output=True, text=True)
    assert went_on.returncode == 0, went_on.stderr
    whole = subprocess.run([*COMMAND, *options, "--out", str(tmp_path / "whole"), "--json"], capture_output=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    summary = json.loads(went_on.stdout)
    assert summary.keys() >= KEYS
    assert (summary["steps"], summary["loss"]) == (15, json.loads(whole.stdout)["loss"])
    assert "step 15/15  loss " in went_on.stderr


@pytest.mark.parametrize("arguments", [[], ["runs/pets"]])
def test_push_asks_for_what_is_missing(lowrank, arguments):
    outcome = lowrank("diffusion", "push", *arguments)
    assert outcome.code == 2
    assert outcome.err == (
        "error: push takes the folder of a run and a repository; give both: push runs/pets OWNER/NAME\n"
    )
