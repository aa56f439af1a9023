"""What the model of a finished run makes of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files.tensors import read_tensors
from lowrank_fl.checkpoint import load_checkpoint
from lowrank_fl.client_state import ClientStates
from lowrank_fl.data.pictures import Shape, to_array
from lowrank_fl.load import load_config
from lowrank_fl.saved_model import fill, network_of, read_description
from lowrank_fl.state import local_names, personalization_of

_BATCH = 100


@dataclass(frozen=True)
class Guess:
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The class of one picture; `top` has the likeliest classes, that one first."""

    path: Path
    label: str
    probability: float
    top: tuple[Guess, ...]


@dataclass(frozen=True)
class Classifier:
    """A trained network, and how pictures become what it reads."""

    model: nn.Module
    shape: Shape
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    """`(channels, 1, 1)`, of pixels from 0 to `white`."""
    white: int

    def prepared(self, path: Path) -> Tensor:
        """The picture as in training: upright, on white, grey or RGB, resized, normalised; `(channels, height, width)`.

        Raises:
            LowrankError: there is no such file, or it is no picture that Pillow reads.
        """
        try:
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                pixels = to_array(image, self.shape)
        # Pillow's plugins raise errors of every kind for broken files.
        except Exception as error:
            reason = "no known picture format" if isinstance(error, UnidentifiedImageError) else error
            raise LowrankError(f"{path} cannot be read as a picture ({reason}); mend it or leave it out") from None
        units = torch.from_numpy(pixels.astype(np.float32)) * (self.white / 255)
        return (units - self.mean) / self.std

    @torch.inference_mode()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The probability of each class, `(n, classes)`, for prepared pictures `(n, channels, height, width)`."""
        return self.model(inputs).softmax(dim=1)


def predict(
    folder: Path, pictures: Sequence[Path], *, top: int = 5, client: int | None = None, device: str = "cpu"
) -> list[Prediction]:
    """Classify pictures with the model of a run.

    Args:
        folder: the run's.
        pictures: files, and folders of which every picture is taken, those in folders below too.
        top: how many classes to name for each picture.
        client: of a personalised run, whose own part to use; without it the model is what clients share over the
            values that their own parts start from.
        device: torch's name of the device.

    Raises:
        UsageError: no pictures, `top` below 1, a client that the run does not have.
        LowrankError: the folder holds no finished run, or one of a text model; files that are damaged or do not belong
            together; a picture that cannot be read.
    """
    if top < 1:
        raise UsageError(f"--top is how many classes to name, at least 1, got {top}")
    files = picture_files(pictures)
    classifier = load_classifier(folder, client, device)
    predictions: list[Prediction] = []
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        inputs = torch.stack([classifier.prepared(path) for path in batch])
        for path, row in zip(batch, classifier(inputs.to(device)).cpu(), strict=True):
            best = row.topk(min(top, len(classifier.classes)))
            guesses = tuple(
                Guess(classifier.classes[place], value)
                for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
            predictions.append(Prediction(path, guesses[0].label, guesses[0].probability, guesses))
    return predictions


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are meant, those of a folder in the order of their names.

    Raises:
        UsageError: no paths.
        LowrankError: a path that does not exist, or a folder without pictures.
    """
    if not paths:
        raise UsageError("a federated run classifies pictures; name some, or folders of them, after the run")
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            kinds = Image.registered_extensions()
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in kinds and file.is_file())
            if not inside:
                raise LowrankError(f"{path} holds no pictures; name files, or another folder")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise LowrankError(f"there is no picture {path}; check the path")
    return found


def load_classifier(folder: Path, client: int | None = None, device: str = "cpu") -> Classifier:
    """The network that `model.json` describes, with the weights of `model.safetensors`, ready to predict.

    Raises:
        UsageError, LowrankError: as `predict`.
    """
    description = read_description(folder)
    shape = tuple(description["input_shape"])
    if len(shape) == 1:
        raise LowrankError(
            f"{folder} is a model of text, which predicts the next character; only models of pictures classify files"
        )
    tensors = read_tensors(folder / "model.safetensors")[0]
    model = network_of(folder, description)
    if client is not None:
        tensors |= _own_part(folder, client, model)
    fill(folder, model, tensors)
    mean, std = (torch.tensor(description[key], dtype=torch.float32).view(-1, 1, 1) for key in ("mean", "std"))
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LowrankError(f"device {device!r} cannot be used here ({reason}); try --device cpu") from None
    return Classifier(
        model.eval(), (shape[0], shape[1], shape[2]), tuple(description["classes"]), mean, std, description["white"]
    )


def _own_part(folder: Path, client: int, model: nn.Module) -> dict[str, Tensor]:
    """What this client has to itself after the last finished round; nothing where it starts from is in the model."""
    config = load_config(str(folder / "config.yaml"))
    kind = config.personalized
    if kind != "ditto" and not local_names(model, personalization_of(config)):
        raise UsageError(
            f"clients of {folder} keep no part of the model (personalization.kind: {kind}); leave --client out"
        )
    if not 0 <= client < config.federation.clients:
        raise UsageError(f"--client is 0 to {config.federation.clients - 1} in {folder}, got {client}")
    parts = folder / "clients" / "personal"
    if not parts.is_dir():
        raise LowrankError(f"{parts} is missing: the clients' own parts are where the clients ran; copy it from there")
    checkpoint = load_checkpoint(folder, config)
    own = ClientStates(parts).load(client, checkpoint.state_round(client) if checkpoint else 0)
    if not own and kind == "ditto":
        raise LowrankError(f"client {client} of {folder} has trained no model of its own; choose another client")
    return own
