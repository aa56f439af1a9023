"""Two models in files, tensor by tensor: what differs, without either of them in memory."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_core.files.base import weight_files
from lowrank_core.files.bundle import Component
from lowrank_core.files.check import some
from lowrank_core.files.peft import COMPONENT_OF_CLASS, COMPONENT_OF_FOLDER
from lowrank_core.files.tensors import open_tensors
from lowrank_core.parsing import parse_json

_EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")
"""Matrices of a CLIP text encoder that are no linear layers."""
_LEVEL = "text_model."
FACTORS = (".lora_", ".lora.", ".hada_", ".lokr_")
"""What stands in the names of an adapter's tensors, in any form of file, and in none of a model's."""
_ORIGINAL = "model.diffusion_model."
"""How keys begin in single files of whole models, which have names of their own."""


@dataclass(frozen=True)
class UnpackedModel:
    """A pipeline that is in no folders: where it lies, and each network's tensors under diffusers' names."""

    path: Path
    networks: Mapping[Component, Mapping[str, Tensor]]

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class NamedFolder:
    """A model's folder that goes by another name than its path."""

    path: Path
    name: str

    def __str__(self) -> str:
        return self.name


Model = Path | NamedFolder | UnpackedModel


def path_of(model: Model) -> Path:
    """Where a model lies."""
    return model if isinstance(model, Path) else model.path


@dataclass(frozen=True)
class StoredModel:
    """The tensors of one model, read when they are asked for.

    shapes: of all of them, by name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @classmethod
    def of_files(cls, files: Sequence[Any]) -> "StoredModel":
        file_of = {name: file for file in files for name in file.keys()}
        shapes = {name: tuple(file_of[name].get_slice(name).get_shape()) for name in sorted(file_of)}
        return cls(shapes, lambda name: file_of[name].get_tensor(name))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "StoredModel":
        return cls({name: tuple(tensors[name].shape) for name in sorted(tensors)}, lambda name: tensors[name])

    def named_as(self, other: "StoredModel") -> "StoredModel":
        """With the level `text_model` where the other has it, which versions of transformers write or not."""
        theirs = {name.removeprefix(_LEVEL): name for name in other.shapes}
        own = {theirs.get(name.removeprefix(_LEVEL), name): name for name in self.shapes}
        return StoredModel({name: self.shapes[old] for name, old in own.items()}, lambda name: self.read(own[name]))

    @property
    def layers(self) -> list[str]:
        """The weights of linear layers and convolutions."""
        return [
            name
            for name, shape in self.shapes.items()
            if name.endswith(".weight") and len(shape) > 1 and not name.endswith(_EMBEDDINGS)
        ]


@dataclass(frozen=True)
class TwoModels:
    """The same network of two pipelines."""

    component: Component
    base: StoredModel
    tuned: StoredModel


@contextmanager
def opened(base: Model, tuned: Model) -> Generator[list[TwoModels]]:
    """The networks that two pipelines have both, with the same layers of the same shapes, under the base's names.

    Raises:
        LowrankError: a folder without weights, or with none of the other's networks; a file of a whole model in its
            authors' layout; an adapter; a damaged file; layers that only one has, or that differ in shape.
    """
    files = [_networks(model) for model in (base, tuned)]
    with ExitStack() as stack:
        stored: list[dict[Component, StoredModel]] = [
            {part: _stored(network, stack) for part, network in networks.items()} for networks in files
        ]
        for model, networks in zip((base, tuned), stored, strict=True):
            _check_no_adapter(model, networks)
        shared: list[Component] = [component for component in files[0] if component in files[1]]
        if not shared:
            raise LowrankError(
                f"{base} holds {_list(files[0])} and {tuned} {_list(files[1])}, which have nothing in common; give two "
                "models of the same kind, and a network that is in a file of its own as its folder, as diffusers "
                "saves it"
            )
        pairs: list[TwoModels] = []
        for component in shared:
            own, other = (networks[component] for networks in stored)
            pair = TwoModels(component, own, other.named_as(own))
            _check(pair, base, tuned)
            pairs.append(pair)
        yield pairs


def _networks(model: Model) -> Mapping[Component, Sequence[Path] | Mapping[str, Tensor]]:
    """The files of each network in a folder, or its tensors where there is none."""
    if isinstance(model, UnpackedModel):
        return model.networks
    folder = path_of(model)
    if not folder.exists():
        raise LowrankError(f"there is no file or folder {folder}; give the folder of a model as diffusers saves it")
    return {part or _component(folder): files for part, files in weight_files(folder).items()}


def _stored(network: Sequence[Path] | Mapping[str, Tensor], stack: ExitStack) -> StoredModel:
    if isinstance(network, Mapping):
        return StoredModel.of_tensors(network)
    return StoredModel.of_files([stack.enter_context(open_tensors(path)) for path in network])


def _check_no_adapter(model: Model, networks: Mapping[Component, StoredModel]) -> None:
    if any(factor in name for network in networks.values() for name in network.shapes for factor in FACTORS):
        what = "the folder of an adapter or of a run" if path_of(model).is_dir() else "an adapter"
        raise LowrankError(f"{model} is {what}, no model; give a whole model")


def _component(folder: Path) -> Component:
    """Which network of a pipeline a folder of one model is, by its config.json, else by its name."""
    try:
        fields = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        kind = fields.get("_class_name") or (fields.get("architectures") or [""])[0]
    except (OSError, ValueError, AttributeError):
        kind = ""
    return COMPONENT_OF_CLASS.get(kind) or COMPONENT_OF_FOLDER.get(folder.resolve().name, "")


def _list(components: Iterable[Component]) -> str:
    return ", ".join(component or "a model without a name" for component in components)


def _check(pair: TwoModels, base: Model, tuned: Model) -> None:
    layers = [pair.base.layers, pair.tuned.layers]
    for names, where in zip(layers, (base, tuned), strict=True):
        if any(name.startswith(_ORIGINAL) for name in names):
            raise LowrankError(
                f"{where} is a whole model in one file, in its authors' layout; save it as a diffusers folder first "
                "(from_single_file of StableDiffusionXLPipeline or StableDiffusionPipeline, then save_pretrained)"
            )
    for own, other, one, two in ((*layers, base, tuned), (*layers[::-1], tuned, base)):
        if missing := sorted(set(own) - set(other)):
            raise LowrankError(f"{two} lacks layers that {one} has: {some(missing)}; give two models of one kind")
    for name in layers[0]:
        shapes = [model.shapes[name] for model in (pair.base, pair.tuned)]
        if shapes[0] != shapes[1]:
            raise LowrankError(
                f"{name} is {_by(shapes[0])} in {base} and {_by(shapes[1])} in {tuned}; give two models of one kind"
            )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
