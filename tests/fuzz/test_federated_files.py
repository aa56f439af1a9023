"""Every file of a federated run, damaged: configurations, rounds, summaries, checkpoints, models, clients' states."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from folders import fuzz
from guard import answers_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzed, json_files, jsonl_files, safetensors_files, yaml_files

from lowrank_fl.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lowrank_fl.client_state import ClientStates
from lowrank_fl.config import DataConfig, PartitionConfig
from lowrank_fl.data.shakespeare import load_shakespeare
from lowrank_fl.folder import RunFolder, finished_rounds, read_summary
from lowrank_fl.infer import load_classifier
from lowrank_fl.load import expand, load_config, load_to_resume
from lowrank_fl.models.build import build_model
from lowrank_fl.reporting.read import find_runs
from lowrank_fl.results import RoundRow, RunSummary
from lowrank_fl.saved_model import start_from
from lowrank_fl.state import state_of

OVERRIDES = ["model.name=mlp", "model.width=4", "model.gamma=0.5", "rounds=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    config = load_config("mnist", OVERRIDES)
    model, _ = build_model(config.model, (1, 2, 2), 3, seed=0)
    arrays = {name: tensor.numpy().copy() for name, tensor in state_of(model).items()}
    written = RunFolder(folder, config)
    for number in (1, 2):
        row = RoundRow(number, 0.5, 1.0, 1.0, 10, 10, 20, 1.0, [0, 1], {"3": "late"}, client_accuracies=[None, 0.5])
        written.add_round(row)
    wire = {"accepted": np.array([[0, 2], [1, 1]])}
    save_checkpoint(folder, config, Checkpoint(2, arrays, {"m": np.zeros(3)}, wire))
    examples = _About((1, 2, 2), ("a", "b", "c"), (0.5,), (0.5,), 255)
    written.save_model(arrays, config, examples)  # type: ignore[arg-type]
    summary = RunSummary("run", str(folder), "fedpara", 0, 2, 0.5, 1.0, 9, 9, 9, 9, 9, 9, 1.0)
    written.save_summary(summary)
    ClientStates(folder / "clients" / "personal").save(0, 2, {"w": torch.ones(2)}, keep=0)
    return folder


@dataclasses.dataclass
class _About:
    input_shape: tuple
    classes: tuple
    mean: tuple
    std: tuple
    white: int


@pytest.mark.slow
def test_configurations(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sweep"] = {"model.method": ["original", "fedpara"], "seed": [0, 1]}
    fuzz(
        run,
        "config.yaml",
        yaml_files(config),
        lambda folder: expand(load_config(str(folder / "config.yaml"))),
        lambda folder: load_to_resume(folder / "config.yaml", ["rounds=3"]),
        lambda folder: load_config(str(folder / "config.yaml"), ["model.rank=2"], seed=1, sweep=["rounds=1,2"]),
        lambda folder: find_runs([folder]),
    )


@pytest.mark.slow
@fuzzed
@given(st.text(max_size=20), st.text(max_size=20))
def test_overrides(key, value):
    for text in (f"{key}={value}", f"model.{value}={key}", f"rounds={value}", key):
        answers_or_refuses(lambda text=text: expand(load_config("mnist", [text])), run_nowhere := _nowhere())
        answers_or_refuses(lambda text=text: expand(load_config("mnist", sweep=[text])), run_nowhere)


def _nowhere():
    from pathlib import Path

    return Path("nowhere")


@pytest.mark.slow
def test_rounds(run):
    config = load_config("mnist", OVERRIDES)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fuzz(
        run,
        "metrics.jsonl",
        jsonl_files(rows),
        lambda folder: [dataclasses.asdict(row) for found in find_runs([folder]).runs for row in found.rows],
        finished_rounds,
        lambda folder: RunFolder(folder, config).keep_rounds(1),
    )


@pytest.mark.slow
def test_summaries(run):
    summary = json.loads((run / "summary.json").read_text())
    fuzz(run, "summary.json", json_files(summary), lambda folder: find_runs([folder]), read_summary)


def test_checkpoints(run):
    config = load_config("mnist", OVERRIDES)
    content = (run / "checkpoint" / "state.safetensors").read_bytes()

    def read(folder):
        checkpoint = load_checkpoint(folder, config)
        return checkpoint and checkpoint.state_round(0)

    fuzz(run, "checkpoint/state.safetensors", safetensors_files(content), read)


def start(folder):
    """The model of a run as the start of another."""
    config = load_config("mnist", OVERRIDES)
    model, _ = build_model(config.model, (1, 2, 2), 3, seed=0)
    start_from(model, config.model.name, folder)


@pytest.mark.slow
def test_descriptions_of_models(run):
    fuzz(run, "model.json", json_files(json.loads((run / "model.json").read_text())), load_classifier, start)


@pytest.mark.slow
def test_weights_of_models(run):
    content = (run / "model.safetensors").read_bytes()
    fuzz(run, "model.safetensors", safetensors_files(content), load_classifier, start)


@pytest.mark.slow
def test_states_of_clients(run):
    name = "clients/personal/0/round-2.safetensors"
    content = (run / name).read_bytes()

    def read(folder):
        return ClientStates(folder / "clients" / "personal").load(0, 2)

    fuzz(run, name, safetensors_files(content), read)


@pytest.mark.slow
def test_the_plays(run):
    rows = [{"play": "a", "role": name, "text": "To be, or not to be. " * 20} for name in ("x", "y")]

    def read(folder):
        path = str(folder / "plays.jsonl")
        return load_shakespeare(DataConfig(name="shakespeare", path=path), PartitionConfig(kind="natural"), seed=0)

    fuzz(run, "plays.jsonl", jsonl_files(rows), read)
