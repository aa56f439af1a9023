"""Every file of a fine-tuning run, damaged: configurations, steps, checkpoints, caches, captions, adapters' folders."""

import dataclasses
import json

import pytest
import torch
from folders import fuzz
from hypothesis import strategies as st
from mutations import damaged, json_files, jsonl_files, safetensors_files, yaml_files
from PIL import Image

from lowrank_cli.inferring import is_federated
from lowrank_core.files.tensors import write_tensors
from lowrank_diffusion.base_files import check_base, identity_of
from lowrank_diffusion.caches import DiskCache
from lowrank_diffusion.checkpoint import (
    Checkpoint,
    load_checkpoint,
    named_state,
    numbered_state,
    save_checkpoint,
)
from lowrank_diffusion.config import BaseConfig, DataConfig
from lowrank_diffusion.data.sources import find_pictures
from lowrank_diffusion.families import SD1, SDXL
from lowrank_diffusion.folder import Metrics, read_summary
from lowrank_diffusion.infer.embeddings import embeddings_of
from lowrank_diffusion.infer.sources import base_of, sources_of
from lowrank_diffusion.load import load_config
from lowrank_diffusion.results import RunSummary, StepRow
from lowrank_diffusion.single_file import read_single_file

KEY = "0" * 64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with one of each file."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "adapter_config.json").write_text("{}")
    (folder / "config.yaml").write_text(json.dumps(load_config("quickstart").model_dump(mode="json")))
    metrics = Metrics(folder)
    for step in (1, 2):
        metrics.add(StepRow(step, 0.5, 1e-4, 1.0, 10, 1.0, validation_loss=0.5))
    summary = RunSummary("run", str(folder), "loha", 0, 2, 0.5, None, 0.5, 1.0, 10, 10, 1.0)
    (folder / "summary.json").write_text(json.dumps(dataclasses.asdict(summary)))
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    state = named_state(optimizer.state_dict(), ["a"]) | {"rank_allocator": {"masks": [[True]], "step": 3}}
    save_checkpoint(folder, "digest", Checkpoint(2, {"unet/a": parameter.detach()}, state, {}), 1)
    DiskCache(folder / "cache", print).put(KEY, {"mean": torch.ones(1, 4, 2, 2), "std": torch.ones(1, 4, 2, 2)})
    write_tensors(folder / "word.safetensors", {"clip_l": torch.ones(2, 4), "clip_g": torch.ones(2, 6)}, {})
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline", "unet": ["a", "b"]})
    )
    for family in (SD1, SDXL):
        parts = {f"{start}weight": torch.ones(2) for start in family.prefixes.values()}
        said = {"modelspec.prediction_type": "v", "ss_v_parameterization": "True"}
        write_tensors(folder / f"{family.name}.safetensors", parts | {"v_pred": torch.empty(0)}, said)
    return folder


@pytest.mark.slow
def test_configurations(run):
    config = json.loads((run / "config.yaml").read_text())
    fuzz(
        run,
        "config.yaml",
        yaml_files(config),
        lambda folder: load_config(str(folder / "config.yaml")),
        lambda folder: base_of(sources_of([folder], print), None, None),
        is_federated,
    )


@pytest.mark.slow
def test_steps(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fuzz(run, "metrics.jsonl", jsonl_files(rows), lambda folder: Metrics(folder).keep(1))


@pytest.mark.slow
def test_summaries(run):
    fuzz(run, "summary.json", json_files(json.loads((run / "summary.json").read_text())), read_summary)


@pytest.mark.slow
def test_checkpoints(run):
    name = "checkpoint/step-00000002.safetensors"

    def read(folder):
        for digest in ("digest", None):
            checkpoint = load_checkpoint(folder, digest)
            assert checkpoint is not None
            numbered_state(checkpoint.optimizer, ["a"])

    fuzz(run, name, safetensors_files((run / name).read_bytes()), read)


@pytest.mark.slow
def test_caches(run):
    name = f"cache/{KEY[:2]}/{KEY}.safetensors"

    def read(folder):
        cache = DiskCache(folder / "cache", lambda _: None)
        return cache.has(KEY), cache.get(KEY)

    fuzz(run, name, safetensors_files((run / name).read_bytes()), read)


@pytest.mark.slow
def test_embeddings_of_words(run):
    file = (run / "word.safetensors").read_bytes()
    fuzz(
        run,
        "word.safetensors",
        safetensors_files(file),
        lambda folder: embeddings_of([], [str(folder / "word.safetensors")])[0].word.tokens,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", [SD1, SDXL], ids=lambda family: family.name)
def test_whole_models_in_one_file(run, family):
    name = f"{family.name}.safetensors"

    def read(folder):
        return identity_of(BaseConfig(path=str(folder / name), config="tiny"), ["vae"])

    fuzz(run, name, safetensors_files((run / name).read_bytes()), lambda folder: read_single_file(folder / name), read)


ROWS = [{"file_name": "a.png", "text": "a house"}, {"file_name": "b.png", "text": "a tree"}]


@pytest.mark.slow
def test_captions_in_jsonl(run):
    fuzz(run, "metadata.jsonl", jsonl_files(ROWS), pictures(None), pictures("text"))


@pytest.mark.slow
def test_captions_in_csv(run):
    contents = st.one_of(
        damaged(b"file_name,text\na.png,a house\nb.png,a tree\n"),
        st.sampled_from(
            [b"file_name,text\na.png," + b"x" * 200_000, b'file_name,text\n"a.png', b"file_name\n../../a.png"]
        ),
    )
    fuzz(run, "metadata.csv", contents, pictures(None), pictures("text"))


@pytest.mark.slow
def test_captions_in_text(run):
    fuzz(run, "a.txt", damaged("a höuse\n".encode()), pictures(None))


def pictures(key):
    def read(folder):
        data = DataConfig(path=str(folder), caption_key=key, caption="x")
        return [picture.name for picture in find_pictures(data, 0, lambda _: None)]

    return read


@pytest.mark.slow
def test_the_index_of_a_base(run):
    tree = json.loads((run / "model_index.json").read_text())
    fuzz(run, "model_index.json", json_files(tree), lambda folder: check_base(folder, "x"))


def test_the_width_by_which_bases_are_told_apart(run):
    tree = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}
    (run / "model_index.json").write_text(json.dumps({"_class_name": SD1.pipeline}))
    fuzz(run, "unet/config.json", json_files(tree), lambda folder: check_base(folder, "x"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_configurations_of_models(run, part, monkeypatch):
    """`lowrank count-params FOLDER`; diffusers and transformers build the network, without its weights."""
    from lowrank_diffusion.base_files import base_folder
    from lowrank_diffusion.folders import blank_from_config

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tree = json.loads((base_folder("tiny", None, print) / part / "config.json").read_text())
    blank_from_config(str(base_folder("tiny", None, print) / part), print)  # the libraries' own caches, once
    fuzz(run, "config.json", json_files(tree), lambda folder: blank_from_config(str(folder), lambda _: None))
