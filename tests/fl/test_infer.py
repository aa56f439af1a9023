"""Class predictions from a run's folder: the run's own accuracy again, from picture files."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_core import LowrankError, UsageError
from lowrank_fl.clients import examples_of, parts_of
from lowrank_fl.folder import RunFolder
from lowrank_fl.infer import load_classifier, picture_files, predict
from lowrank_fl.load import load_config
from lowrank_fl.run import run


class Silent:
    def note(self, text): ...

    def run_started(self, start): ...

    def round_ended(self, row): ...

    def run_ended(self, summary): ...


def digits(*overrides: str):
    small = ["rounds=2", "federation.clients=4", "federation.clients_per_round=2", "federation.epochs=1"]
    small += ["model.name=mlp", "model.width=8", "data.max_examples=200", "partition.kind=iid", "engine.workers=1"]
    return load_config("quickstart", [*small, *overrides])


def write_digits(folder, pixels):
    """Pictures of `(n, 1, 8, 8)` values from 0 to 16, of 256 grey values as any file has them."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pixels):
        grey = np.round(np.asarray(picture[0], dtype=np.float64) * 255 / 16).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{number:04}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on scikit-learn's digits, its summary, and its test examples."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = digits("model.method=original", "rounds=8", "model.width=16")
    (summary,) = run(config, folder, Silent())
    return folder, summary, examples_of(config)


@pytest.mark.slow
def test_picture_files_of_the_test_set_give_the_runs_accuracy(trained, tmp_path):
    folder, summary, examples = trained
    write_digits(tmp_path / "test", examples.test_inputs)
    predictions = predict(folder, [tmp_path / "test"])
    right = [
        found.label == examples.classes[label]
        for found, label in zip(predictions, examples.test_labels.tolist(), strict=True)
    ]
    assert summary.accuracy > 0.3
    assert np.mean(right) == pytest.approx(summary.accuracy, abs=2 / len(right))


@pytest.mark.slow
def test_the_top_is_a_distribution_in_falling_order(trained, tmp_path):
    folder, _, examples = trained
    write_digits(tmp_path / "test", examples.test_inputs[:3])
    for found in predict(folder, [tmp_path / "test"], top=99):
        assert sorted(guess.label for guess in found.top) == sorted(examples.classes)
        chances = [guess.probability for guess in found.top]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1)
        assert (found.label, found.probability) == (found.top[0].label, found.top[0].probability)
    assert len(predict(folder, [tmp_path / "test"], top=2)[0].top) == 2


@pytest.fixture(scope="module")
def personalised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "own"
    config = digits("model.method=pfedpara", "partition.held_out=0.3", "federation.clients_per_round=3")
    (summary,) = run(config, folder, Silent())
    return folder, summary, config


@pytest.mark.slow
def test_a_clients_own_part_gives_that_clients_accuracy(personalised, tmp_path):
    folder, summary, config = personalised
    examples = examples_of(config)
    parts = parts_of(config, examples)
    answers = {}
    for client in range(4):
        rows = torch.from_numpy(parts.held_out[client])
        write_digits(tmp_path / str(client), examples.inputs[rows])
        answers[client] = predict(folder, [tmp_path / str(client)], client=client)
        right = [
            found.label == examples.classes[label]
            for found, label in zip(answers[client], examples.labels[rows].tolist(), strict=True)
        ]
        assert np.mean(right) == pytest.approx(summary.client_accuracies[client], abs=1 / len(right))
    others = predict(folder, [tmp_path / "0"])
    assert [found.probability for found in others] != [found.probability for found in answers[0]]


@pytest.mark.slow
def test_a_part_that_an_unfinished_round_left_is_not_used(personalised, tmp_path):
    folder, _, _ = personalised
    copied = shutil.copytree(folder, tmp_path / "run")
    write_digits(tmp_path / "test", np.full((2, 1, 8, 8), 7))
    parts = sorted((copied / "clients" / "personal").glob("*/round-2.safetensors"))
    newest, other = parts[0], parts[1]
    own = newest.parent
    client = int(own.name)
    before = predict(copied, [tmp_path / "test"], client=client)
    shutil.copy(other, own / "round-3.safetensors")
    assert predict(copied, [tmp_path / "test"], client=client) == before
    shutil.copy(other, newest)
    assert predict(copied, [tmp_path / "test"], client=client) != before


def colour_run(folder, channels=3):
    """A run's folder with an untrained network that reads `channels` x 16 x 12 pixels."""
    from lowrank_fl.data.examples import Examples
    from lowrank_fl.models.build import build_model
    from lowrank_fl.state import state_of

    config = load_config("quickstart", ["model.method=original", "model.name=mlp", "model.width=4"])
    inputs = torch.zeros(1, channels, 16, 12, dtype=torch.uint8)
    labels = torch.zeros(1, dtype=torch.int64)
    statistics = tuple(10.0 * number for number in range(1, channels + 1))
    examples = Examples("made", inputs, labels, inputs, labels, ("cat", "dog"), statistics, statistics)
    model, _ = build_model(config.model, (channels, 16, 12), 2, seed=0)
    arrays = {name: tensor.numpy() for name, tensor in state_of(model).items()}
    RunFolder(folder, config).save_model(arrays, config, examples)
    return folder


def test_pictures_are_prepared_as_in_training(tmp_path):
    classifier = load_classifier(colour_run(tmp_path / "run"))
    half = Image.new("RGBA", (12, 16), (200, 100, 50, 255))
    half.putpixel((0, 0), (0, 0, 0, 0))
    half.save(tmp_path / "half.png")
    prepared = classifier.prepared(tmp_path / "half.png")
    assert prepared.shape == (3, 16, 12)
    assert prepared[:, 5, 5].tolist() == pytest.approx([(200 - 10) / 10, (100 - 20) / 20, (50 - 30) / 30])
    assert prepared[:, 0, 0].tolist() == pytest.approx([24.5, 11.75, 7.5])  # white shows through
    Image.new("L", (24, 32), 40).save(tmp_path / "grey.png")
    assert classifier.prepared(tmp_path / "grey.png")[:, 3, 3].tolist() == pytest.approx([3, 1, 1 / 3])


def test_exif_turns_pictures(tmp_path):
    classifier = load_classifier(colour_run(tmp_path / "run", channels=1))
    lying = Image.new("L", (16, 12), 0)
    lying.paste(255, (0, 0, 8, 12))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right: left becomes top
    lying.save(tmp_path / "turned.png", exif=exif)
    prepared = classifier.prepared(tmp_path / "turned.png")
    assert prepared[0, 0].tolist() == [24.5] * 12
    assert prepared[0, -1].tolist() == [-1.0] * 12


def test_folders_are_walked_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.png", "b/a.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in picture_files([tmp_path])] == [
        "a.png",
        "b/a.JPG",
        "z.png",
    ]
    assert picture_files([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]


@pytest.fixture
def made(tmp_path):
    Image.new("RGB", (12, 16)).save(tmp_path / "one.png")
    return colour_run(tmp_path / "run")


def change(folder, **values):
    path = folder / "model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (description | values).items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "model.json").unlink(), "has no model.json, which a finished run has; finish it with"),
        (lambda run: (run / "model.json").write_text("{"), "model.json is not JSON"),
        (lambda run: change(run, classes=None), "model.json has no classes"),
        (lambda run: change(run, classes=["a", "b", "c"]), "fc2.bias is not as model.json has it"),
        (lambda run: change(run, model={"name": "gpt"}), "cannot be used (name is cnn"),
        (lambda run: change(run, input_shape=[1, 9**6, 9**6]), "numbers, and model.safetensors holds"),
        (lambda run: change(run, input_shape=[1, 2**40, 2**40]), "model.json describes no network"),
        (lambda run: change(run, input_shape="x"), "model.json has input_shape: input should be"),
        (lambda run: change(run, input_shape=[80]), "is a model of text, which predicts the next character"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\x09"), "is not a safetensors file"),
        (lambda run: (run / "model.safetensors").unlink(), "there is no file"),
    ],
)
def test_damaged_runs_are_refused_in_a_sentence(made, tmp_path, damage, message):
    damage(made)
    with pytest.raises(LowrankError, match=re.escape(message)):
        predict(made, [tmp_path / "one.png"])


def test_a_mean_is_any_number(made, tmp_path):
    change(made, mean=[2**63, 0, 0])
    assert predict(made, [tmp_path / "one.png"])


def test_a_sweep_is_asked_for_one_of_its_runs(made, tmp_path):
    with pytest.raises(LowrankError, match=re.escape(f"name one of its runs, such as {made}")):
        predict(tmp_path, [tmp_path / "one.png"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.png", None, "there is no picture"),
        ("text.png", b"no picture", "cannot be read as a picture (no known picture format); mend it or leave it out"),
        ("empty", "folder", "holds no pictures"),
    ],
)
def test_bad_pictures_are_named(made, tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(LowrankError, match=re.escape(message)) as caught:
        predict(made, [tmp_path / "one.png", path])
    assert str(path) in str(caught.value)


def test_a_picture_that_is_cut_off_is_named(made, tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(LowrankError, match=re.escape(f"{path} cannot be read as a picture")):
        predict(made, [path])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top": 0}, "--top is how many classes to name, at least 1, got 0"),
        ({"client": 0}, "keep no part of the model (personalization.kind: none); leave --client"),
    ],
)
def test_requests_that_cannot_be_meant(made, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        predict(made, [tmp_path / "one.png"], **arguments)


def test_no_pictures_are_asked_for(made):
    with pytest.raises(UsageError, match="a federated run classifies pictures; name some"):
        predict(made, [])


def test_clients_are_counted_from_nought(personalised, made, tmp_path):
    with pytest.raises(UsageError, match=re.escape("--client is 0 to 3 in")):
        predict(personalised[0], [tmp_path / "one.png"], client=4)


def test_parts_that_stayed_on_other_machines_are_missed(personalised, made, tmp_path):
    copied = shutil.copytree(personalised[0], tmp_path / "own")
    shutil.rmtree(copied / "clients")
    with pytest.raises(LowrankError, match="the clients' own parts are where the clients ran"):
        predict(copied, [tmp_path / "one.png"], client=0)


def test_a_client_without_a_ditto_model_of_its_own(made, tmp_path):
    config = load_config(
        "quickstart", ["personalization.kind=ditto", "partition.held_out=0.2", "model.method=original"]
    )
    RunFolder(made, config)
    (made / "clients" / "personal").mkdir(parents=True)
    with pytest.raises(LowrankError, match="has trained no model of its own; choose another client"):
        predict(made, [tmp_path / "one.png"], client=0)


def test_a_device_that_is_not_there(made, tmp_path):
    with pytest.raises(LowrankError, match="device 'nothing' cannot be used here"):
        predict(made, [tmp_path / "one.png"], device="nothing")
