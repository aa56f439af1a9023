"""Runs to the hub and back, against a server here that speaks as much of the hub's language as that takes."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lowrank_core import LowrankError, UsageError

pytestmark = pytest.mark.filterwarnings("default")
HOUSES = [
    "data.resolution=32",
    "data.bucket_step=16",
    "data.max_images=5",
    "adapter.rank=2",
    "adapter.target=[attn2.to_v]",
    "train.steps=4",
    "train.batch_size=2",
    "train.device=cpu",
    "train.checkpoint_every=2",
    "sample.prompts=[a house]",
    "sample.steps=1",
    "sample.every=100",
]


class Hub(ThreadingHTTPServer):
    """Repositories in memory: branches by repository, and the files of each commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[repository][branch]]


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers["Authorization"] != "Bearer hf_mine":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        repository, what, branch = re.fullmatch(r"/api/models/(\w+/\w+)/(\w+)/([\w%]+)", self.path).groups()
        branches = self.server.branches[repository]
        if what == "branch":
            branches.setdefault(branch, branches["main"])
            return self.answer(200, {})
        if what == "preupload":
            asked = json.loads(body)["files"]
            return self.answer(
                200,
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]},
            )
        files = dict(self.server.files(repository, branch))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        sha = hashlib.sha1(body).hexdigest()
        self.server.commits[sha], branches[branch] = files, sha
        self.answer(200, {"commitUrl": f"https://huggingface.co/{repository}/commit/{sha}", "commitOid": sha})

    def create(self, wanted: dict) -> None:
        repository = f"{wanted.get('organization', 'me')}/{wanted['name']}"
        if repository.startswith("others/"):
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        new = repository not in self.server.branches
        self.server.commits.setdefault("0" * 40, {})
        self.server.branches.setdefault(repository, {"main": "0" * 40})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.add(repository)
        self.answer(200 if new else 409, {"url": f"https://huggingface.co/{repository}"})

    def do_GET(self) -> None:
        api = re.match(r"/api/models/(\w+/\w+)(?:/(revision|tree)/(\w+))?", self.path)
        found = api or re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", self.path)
        if found is None:
            return self.answer(404, {})
        repository, *rest = found.groups()
        branches = self.server.branches.get(repository)
        if branches is None:
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        sha = branches.get((rest[1] if api else rest[0]) or "main", rest[1] if api else rest[0])
        files = self.server.commits.get(sha)
        if files is None:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if api and rest[0] == "tree":
            return self.answer(
                200,
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ],
            )
        if api:
            siblings = [{"rfilename": path} for path in files]
            return self.answer(
                200, {"_id": "0", "id": repository, "modelId": repository, "sha": sha, "siblings": siblings}
            )
        if rest[1] not in files:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        content = files[rest[1]]
        self.answer(200, content, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    do_HEAD = do_GET

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and a login there."""
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    # As HF_ENDPOINT and HF_HOME set them.
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_folder(tmp_path):
    """What of a run's folder can be pushed, without having trained."""
    from lowrank_diffusion.folder import begin
    from lowrank_diffusion.load import load_config

    config = load_config(None, ["data.path=/secret/place/photos", "cache.folder=~/cache", "base.path=../models/pony"])
    run = begin(tmp_path / "run", config)
    (run / "unet").mkdir()
    for name in ("unet/adapter_config.json", "unet/adapter_model.safetensors", "adapter.safetensors", "metrics.jsonl"):
        (run / name).write_bytes(name.encode())
    (run / "README.md").write_text('pipeline.load_lora_weights(".", weight_name="adapter_lora.safetensors")')
    (run / "processes.log").write_text("private")
    return run


def note(text: str) -> None: ...


@pytest.fixture
def lowrank(capsys):
    from lowrank_cli.main import main

    def lowrank(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return lowrank


def test_a_pushed_folder_holds_what_others_may_see(hub, run_folder, lowrank):
    code, out, err = lowrank("diffusion", "push", run_folder, "me/pets", "--private", "--revision", "trial", "--json")
    assert code == 0, err
    assert json.loads(out)["url"].startswith("https://huggingface.co/me/pets/commit/")
    files = hub.files("me/pets", "trial")
    assert (
        sorted(json.loads(out)["files"])
        == sorted(files)
        == [
            "README.md",
            "adapter.safetensors",
            "config.yaml",
            "metrics.jsonl",
            "unet/adapter_config.json",
            "unet/adapter_model.safetensors",
        ]
    )
    assert "it is public" not in err
    assert hub.private == {"me/pets"}
    assert hub.files("me/pets") == {}
    config = yaml.safe_load(files["config.yaml"])
    assert (config["data"]["path"], config["cache"]["folder"], config["base"]["path"]) == ("photos", "cache", "pony")
    assert not any(b"secret" in content or b"models/" in content for content in files.values())
    assert b'load_lora_weights("me/pets", weight_name' in files["README.md"]
    assert files["adapter.safetensors"] == b"adapter.safetensors"
    from lowrank_diffusion.fetching import local_adapter

    told = []
    code, _, err = lowrank("diffusion", "push", run_folder, "me/open", "--revision", "new/ears")
    assert code == 0, err
    assert "to hf://me/open@new%2Fears on the Hugging Face hub; if it is made, it is public (--private" in err
    assert hub.files("me/open", "new%2Fears").keys() == files.keys()
    assert local_adapter("hf://me/pets@trial/adapter.safetensors", told.append).read_bytes() == b"adapter.safetensors"
    assert told[0].startswith("fetching the adapter hf://me/pets@trial/adapter.safetensors from the Hugging Face hub")


def test_a_run_without_peft_folders_is_pushed_with_its_single_file(hub, run_folder, lowrank):
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace("dora: false", "dora: true"))
    for file in (run_folder / "unet").iterdir():
        file.unlink()
    (run_folder / "adapter.safetensors").rename(run_folder / "quickstart.safetensors")
    code, _, err = lowrank("diffusion", "push", run_folder, "me/pets", "--quiet")
    assert code == 0, err
    assert "quickstart.safetensors" in hub.files("me/pets")
    (run_folder / "quickstart.safetensors").unlink()
    code, _, err = lowrank("diffusion", "push", run_folder, "me/pets", "--quiet")
    assert (code, "has no adapter yet; go on with it by lowrank diffusion train --resume" in err) == (1, True)


@pytest.mark.parametrize(
    ("repository", "change", "code", "sentence"),
    [
        ("pets", None, 2, "'pets' is no repository; give OWNER/NAME"),
        ("me/a--b", None, 2, "'me/a--b' is no repository; give OWNER/NAME"),
        ("me/pets", "no token", 1, "(nobody is logged in; run hf auth login, or set HF_TOKEN)"),
        ("me/pets", "bad token", 1, "(the hub takes no login of yours; run hf auth login, or set HF_TOKEN)"),
        ("others/pets", None, 1, "(your login has no right to do that; take a token that may write"),
        ("me/pets", "offline", 1, "(HF_HUB_OFFLINE forbids the network; unset it)"),
        ("me/pets", "down", 1, "(the hub cannot be reached: "),
        ("me/pets", "no run", 1, "holds no run to push: there is no config.yaml in it; give the folder of a run"),
        ("me/pets", "no adapter", 1, "has no adapter yet; go on with it by lowrank diffusion train --resume"),
    ],
)
def test_what_keeps_a_run_from_the_hub_is_one_sentence(
    hub, run_folder, lowrank, monkeypatch, repository, change, code, sentence
):
    from huggingface_hub import constants

    if change == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif change == "bad token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    elif change == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif change == "down":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif change == "no run":
        (run_folder / "config.yaml").unlink()
    elif change == "no adapter":
        (run_folder / "unet" / "adapter_config.json").unlink()
    got, out, err = lowrank("diffusion", "push", run_folder, repository, "--quiet")
    assert (got, out) == (code, "")
    assert sentence in err
    assert "Traceback" not in err
    assert not any(hub.commits.values())


@pytest.mark.parametrize(
    ("place", "pushed", "sentence"),
    [
        ("hf://me/nothing", False, "there is no such repository, or it is private"),
        ("hf://me/pets@trial", True, "the repository has no such revision"),
        (
            "hf://me/pets",
            True,
            "holds no checkpoint to go on from; push it again by lowrank diffusion push FOLDER me/pets",
        ),
    ],
)
def test_what_keeps_a_run_from_being_fetched_is_one_sentence(
    hub, run_folder, lowrank, tmp_path, place, pushed, sentence
):
    if pushed:
        lowrank("diffusion", "push", run_folder, "me/pets", "--quiet")
    code, out, err = lowrank("diffusion", "train", "--resume", place, "--out", tmp_path / "new", "--quiet")
    assert (code, out) == (1, "")
    assert sentence in err
    assert not (tmp_path / "new").exists()


def test_offline_nothing_is_fetched_that_is_not_in_the_cache(hub, monkeypatch):
    from huggingface_hub import constants

    from lowrank_diffusion.fetching import local_adapter

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LowrankError, match=r"the adapter hf://me/pets cannot be fetched .* \(HF_HUB_OFFLINE forbids"):
        local_adapter(Path("hf://me/pets"), note)


def test_places_on_the_hub():
    from lowrank_diffusion.hub import HubPlace, hub_place

    assert hub_place("hf://me/pets") == hub_place(Path("hf://me/pets")) == HubPlace("me/pets")
    assert hub_place("hf://me/pets@v1/unet/a.safetensors") == HubPlace("me/pets", "v1", "unet/a.safetensors")
    assert hub_place("hf://me/pets@refs/pr/12/a.safetensors") == HubPlace("me/pets", "refs/pr/12", "a.safetensors")
    assert hub_place("hf://me/pets@refs%2Fpr%2F12") == HubPlace("me/pets", "refs/pr/12")
    assert hub_place("hf://me/pets@new%2Fears/a.safetensors") == HubPlace("me/pets", "new/ears", "a.safetensors")
    for place in ("hf://me/pets", "hf://me/pets@refs/pr/12/a.safetensors", "hf://me/pets@new%2Fears"):
        assert str(hub_place(Path(place))) == place
    assert hub_place("me/pets") is None
    for wrong in ("hf://pets", "hf://me/../x", "hf://"):
        with pytest.raises(UsageError, match="OWNER/NAME"):
            hub_place(wrong)
    with pytest.raises(UsageError, match="hf://pets is no place"):
        hub_place(Path("hf://pets"))


def test_adapters_from_the_hub_are_named_by_repository_or_file(hub):
    from lowrank_diffusion.infer.sources import sources_of

    weights = bytes([2, *[0] * 7]) + b"{}"
    others = {"config.yaml": b"job: extension", "adapter_config.json": b"{}", "adapter_model.safetensors": weights}
    hub.branches["me/pets"] = {"main": "1" * 40}
    hub.commits["1" * 40] = others | {"oil.safetensors": weights}
    sources = sources_of([Path("hf://me/pets"), Path("hf://me/pets/oil.safetensors")], note)
    assert [(source.name, source.run) for source in sources] == [("pets", None), ("oil", None)]
    hub.commits["2" * 40] = {"config.yaml": b"name: kept", "metrics.jsonl": b"", "unet/adapter_config.json": b"{}"}
    hub.branches["me/pets"]["main"] = "2" * 40
    (run,) = sources_of([Path("hf://me/pets")], note)
    assert (run.name, run.run.name) == ("kept", "kept")
    # PEFT has no form for this one, so the run has it in its single file.
    described = b"{name: kept, adapter: {method: loha, dora: true}}"
    hub.commits["3" * 40] = {"config.yaml": described, "metrics.jsonl": b"", "kept.safetensors": weights}
    hub.branches["me/pets"]["main"] = "3" * 40
    (run,) = sources_of([Path("hf://me/pets")], note)
    assert (run.name, run.run.name, list(run.digests())) == ("kept", "kept", ["kept.safetensors"])


@pytest.mark.parametrize(
    ("place", "shown"),
    [("/a/b", "b"), ("~/b", "b"), ("../b", "b"), ("a/../../b", "b"), ("photos", "photos"), ("me/pets", "me/pets")],
)
def test_paths_that_lead_elsewhere_are_cut_down(place, shown):
    from lowrank_diffusion.published import without_folders

    assert without_folders(place) == shown


def test_a_run_from_the_hub_tells_weights_and_biases_only_if_asked_to(hub, tmp_path):
    from lowrank_diffusion.fetching import fetch_run
    from lowrank_diffusion.hub import HubPlace
    from lowrank_diffusion.load import load_config

    hub.branches["others/pets"] = {"main": "1" * 40}
    hub.commits["1" * 40] = {
        "config.yaml": b"{track: {wandb: true, project: theirs, entity: others, tensorboard: true}, hub: {push: a/b}}",
        "wandb-id": b"abc",
        "checkpoint/step-00000002.safetensors": b"",
    }
    place, asked = HubPlace("others/pets"), ["track.wandb=true", "track.entity=me"]
    quiet, told = fetch_run(place, tmp_path / "quiet", [], note), fetch_run(place, tmp_path / "told", asked, note)
    track = load_config(str(quiet / "config.yaml")).track
    assert (track.wandb, track.project, track.entity, track.tensorboard) == (False, "lowrank", None, True)
    assert not (quiet / "wandb-id").exists()
    track = load_config(str(told / "config.yaml")).track
    assert (track.wandb, track.project, track.entity) == (True, "lowrank", "me")
    assert (told / "wandb-id").read_bytes() == b"abc"


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_goes_on_from_the_hub_with_the_same_bits(hub, lowrank, tmp_path, monkeypatch):
    """Two runs push: one whole, one killed after its first checkpoint, which is fetched and ended elsewhere."""
    from lowrank_core.files.tensors import read_tensors
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    pushing = ["hub.push=me/killed", "hub.checkpoints=true", f"cache.folder={tmp_path / 'cache'}", "cache.latents=disk"]

    class Stopping(Silent):
        def step_ended(self, row) -> None:
            if row.step == 3:
                raise Killed

    run(load_config(None, [*HOUSES, "hub.push=me/whole"]), tmp_path / "whole", Silent())
    with pytest.raises(Killed):
        run(load_config(None, [*HOUSES, *pushing]), tmp_path / "killed", Stopping())
    kept = hub.files("me/killed")
    assert {name for name in kept if "/" in name} == {"checkpoint/step-00000002.safetensors", "samples/step-0.png"}
    assert str(tmp_path).encode() not in kept["config.yaml"]
    (tmp_path / "killed").rename(tmp_path / "gone")
    code, out, err = lowrank(
        "diffusion", "train", "--resume", "hf://me/killed", "--out", "new", "-o", "cache.latents=disk", "--json"
    )
    assert code == 0, err
    assert "after 2 finished ones" in err
    assert json.loads(out)["run_dir"] == "new"
    mine = read_tensors(tmp_path / "new" / "unet" / "adapter_model.safetensors")[0]
    other = read_tensors(tmp_path / "whole" / "unet" / "adapter_model.safetensors")[0]
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    # It went back to where it came from, whole, with one checkpoint.
    files = hub.files("me/killed")
    assert [name for name in files if name.startswith("checkpoint/")] == ["checkpoint/step-00000004.safetensors"]
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["widget"] == [{"text": "a house", "output": {"url": "samples/step-4.png"}}]
    assert (card["instance_prompt"], "base_model" in card, "license" in card) == ("a house", False, False)
    assert str(tmp_path).encode() not in b"".join(files.values())
    # What would change its numbers is refused.
    changed = ["--resume", "hf://me/killed", "--out", "other", "-o", "train.lr=1", "-o", "train.steps=5", "--quiet"]
    code, _, err = lowrank("diffusion", "train", *changed)
    assert code == 1
    assert "was left by a run with another configuration" in err
    # An adapter there is used as one here is.
    drawn = ["--prompt", "a house", "--size", "32", "--steps", "1", "--json", "--device", "cpu"]
    pictures = []
    for place in ("hf://me/whole", tmp_path / "whole"):
        code, out, err = lowrank("infer", place, *drawn, "--out", tmp_path / f"pictures-{len(pictures)}")
        assert code == 0, err
        pictures.append(Image.open(json.loads(out)["images"][0]).tobytes())
    assert pictures[0] == pictures[1]
    started = ["adapter.init_from=hf://me/whole", "train.steps=1", "train.lr=1e-12"]
    run(load_config(None, [*HOUSES, *started]), tmp_path / "next", Silent())
    after = read_tensors(tmp_path / "next" / "unet" / "adapter_model.safetensors")[0]
    assert all(torch.allclose(after[name], other[name], atol=1e-7) for name in other)


@pytest.mark.slow
def test_a_hub_that_fails_costs_no_training(hub, tmp_path, monkeypatch):
    from lowrank_diffusion.load import load_config
    from lowrank_diffusion.results import Silent
    from lowrank_diffusion.run import run

    wanted = [*HOUSES, "train.checkpoint_every=1", "train.steps=2", "sample.prompts=[]"]
    with pytest.raises(LowrankError, match=r"others/pets cannot be pushed to .* no right"):
        run(load_config(None, [*wanted, "hub.push=others/pets"]), tmp_path / "early", Silent())
    assert not (tmp_path / "early" / "config.yaml").exists()
    told = []

    class Closing(Silent):
        def note(self, text: str) -> None:
            told.append(text)

        def run_started(self, start) -> None:
            monkeypatch.setenv("HF_TOKEN", "hf_other")

    sentence = (
        r"the run is finished and kept in .*, but .*; mend that, and push it by lowrank diffusion push .* me/pets"
    )
    with pytest.raises(LowrankError, match=sentence):
        run(load_config(None, [*wanted, "hub.push=me/pets", "hub.checkpoints=true"]), tmp_path / "run", Closing())
    assert any(text.endswith("training goes on") for text in told)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
