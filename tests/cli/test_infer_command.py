"""`lowrank infer`."""

import json

import pytest
from PIL import Image

from lowrank_fl.load import load_config
from lowrank_fl.run import run


class Silent:
    def note(self, text): ...

    def run_started(self, start): ...

    def round_ended(self, row): ...

    def run_ended(self, summary): ...


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """A run of one round, personalised, and two pictures."""
    folder = tmp_path_factory.mktemp("infer")
    small = ["rounds=1", "federation.clients=3", "federation.clients_per_round=3", "data.max_examples=60"]
    small += ["model.name=mlp", "model.width=8", "partition.kind=iid", "partition.held_out=0.2", "engine.workers=1"]
    run(load_config("quickstart", ["model.method=pfedpara", *small]), folder / "run", Silent())
    (folder / "pictures").mkdir()
    for number in range(2):
        Image.new("L", (8, 8), 200 * number).save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.mark.slow
def test_classes_as_json(lowrank, federated):
    outcome = lowrank("infer", str(federated / "run"), str(federated / "pictures"), "--top", "2", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)["predictions"]
    assert [each["path"] for each in found] == [str(federated / "pictures" / f"{n}.png") for n in range(2)]
    assert found[0]["top"][0] == {"label": found[0]["label"], "probability": found[0]["probability"]}
    assert [len(each["top"]) for each in found] == [2, 2]


@pytest.mark.slow
def test_classes_as_a_table(lowrank, federated):
    pictures = [str(federated / "pictures" / f"{number}.png") for number in range(2)]
    outcome = lowrank("infer", str(federated / "run"), *pictures, "--top", "3")
    head, _, *rows = outcome.out.splitlines()
    assert head.split() == ["picture", "class", "probability"]
    assert len(rows) == 6
    assert rows[0].startswith(pictures[0])
    assert rows[0].rstrip().endswith("%")
    assert "--client N uses a client's" in outcome.err
    assert lowrank("infer", str(federated / "run"), *pictures, "--client", "1").err == ""
    assert lowrank("infer", str(federated / "run"), *pictures, "--quiet").err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("RUN", "--prompt", "a cat"), 2, "--prompt is for adapters, and this is a federated run"),
        (("RUN", "--embedding", "a.safetensors"), 2, "--embedding is for adapters, and this is a federated run"),
        (("RUN",), 2, "a federated run classifies pictures; name some"),
        (("RUN", "gone.png"), 1, "there is no picture gone.png"),
        ((), 2, "infer takes an adapter: the folder of a run"),
        (("gone", "--prompt", "a cat"), 1, "there is no file or folder gone"),
        (("RUN", "--serve"), 2, "--serve is for adapters, and this is a federated run"),
        (("gone", "--port", "0"), 2, "--host and --port say where the page is shown; give --serve, too"),
        (("--serve", "--base", "tiny", "--port", "-1"), 2, "--port must be from 0 to 65535, got -1"),
        (("gone", "--client", "1"), 2, "--client is for the run of a federation; an adapter has no clients"),
    ],
)
def test_errors_are_one_sentence(lowrank, federated, arguments, code, message):
    outcome = lowrank("infer", *(str(federated / "run") if each == "RUN" else each for each in arguments))
    assert outcome.code == code
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_federated_run_that_has_not_finished(lowrank, tmp_path):
    (tmp_path / "config.yaml").write_text("federation: {clients: 3}\n")
    outcome = lowrank("infer", str(tmp_path), "one.png")
    # The picture is looked for first.
    assert "there is no picture one.png" in outcome.err
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    assert "has no model.json, which a finished run has" in lowrank("infer", str(tmp_path), str(tmp_path)).err


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What `lowrank_diffusion.infer.run.infer` was asked for, in place of drawing."""
    import lowrank_diffusion.infer.run as module
    from lowrank_diffusion.infer.recipe import UsedAdapter, UsedEmbedding

    asked = []

    def infer(request, told):
        asked.append(request)
        told.note("unet: adapters merged")
        told.drawn(1, 1)
        used = UsedAdapter("pets", 0.5, {"pets.safetensors": "ab"})
        word = UsedEmbedding("<cat>", "pets_embedding.safetensors", "cd")
        grid = tmp_path / "grid.png" if request.grid else None
        return module.Drawn(tmp_path, [tmp_path / "01-01-a-cat.png"], grid, "tiny", [used], [word], {"unet": True})

    monkeypatch.setattr(module, "infer", infer)
    return asked


def test_options_reach_the_request(lowrank, drawn, tmp_path):
    options = "--prompt a --prompt b --negative c --weight 0.5 --weight -1 --base tiny --vae v --no-merge --seed 3"
    options += " --images 2 --size 64x32 --steps 4 --guidance 2.5 --scheduler euler-a --batch 2 --grid --device cpu"
    options += " --precision bf16 --out new --quiet --embedding cat.safetensors:<cat>"
    outcome = lowrank("infer", "one", "two", *options.split())
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [str(tmp_path / "01-01-a-cat.png"), str(tmp_path / "grid.png")]
    (request,) = drawn
    assert [str(path) for path in request.adapters] == ["one", "two"]
    assert (request.prompts, request.negative, request.weights) == (["a", "b"], "c", [0.5, -1.0])
    assert (request.base, request.vae, request.merged, request.seed) == ("tiny", "v", False, 3)
    assert (request.images, request.size, request.steps, request.guidance) == (2, "64x32", 4, 2.5)
    assert (request.scheduler, request.batch, request.grid, request.device) == ("euler-a", 2, True, "cpu")
    assert (request.precision, str(request.out)) == ("bf16", "new")
    assert request.embeddings == ["cat.safetensors:<cat>"]


def test_without_options_the_request_is_the_librarys_own(lowrank, drawn):
    from pathlib import Path

    from lowrank_diffusion.infer.request import Request

    outcome = lowrank("infer", "one", "--prompt", "a", "--json")
    assert drawn == [Request([Path("one")], ["a"], [], [])]
    assert outcome.err == "unet: adapters merged\n"
    said = json.loads(outcome.out)
    assert [path.rsplit("/", 1)[-1] for path in said["images"]] == ["01-01-a-cat.png"]
    assert said["adapters"] == [{"name": "pets", "weight": 0.5, "files": {"pets.safetensors": "ab"}}]
    assert said["embeddings"] == [{"word": "<cat>", "file": "pets_embedding.safetensors", "sha256": "cd"}]
    assert (said["base"], said["grid"], said["merged"]) == ("tiny", None, {"unet": True})


def test_a_page_is_asked_for(lowrank, monkeypatch, tmp_path):
    import lowrank_diffusion.infer.serve as module

    asked = []

    def serve(request, host, port, note, ready):
        asked.append((request.prompts, request.base, host, port))
        note("unet: adapters merged")
        ready("http://127.0.0.1:7860", tmp_path)

    monkeypatch.setattr(module, "serve", serve)
    outcome = lowrank("infer", "--base", "tiny", "--serve")
    assert (outcome.code, outcome.out) == (0, "http://127.0.0.1:7860\n")
    assert outcome.err == f"unet: adapters merged\npictures go to {tmp_path}; Ctrl-C ends the page\n"
    options = ["--prompt", "a", "--serve", "--host", "0.0.0.0", "--port", "0", "--json", "--quiet"]
    outcome = lowrank("infer", "one", *options)
    assert (json.loads(outcome.out), outcome.err) == ({"url": "http://127.0.0.1:7860", "out": str(tmp_path)}, "")
    assert asked == [([], "tiny", "127.0.0.1", 7860), (["a"], None, "0.0.0.0", 0)]
