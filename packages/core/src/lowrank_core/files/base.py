"""A base model as files: which layers it has, of what shape, and in which file each weight stands."""

from collections.abc import Collection
from pathlib import Path

from lowrank_core.adapters.geometry import Geometry
from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import AdapterFile, Component, Layers
from lowrank_core.files.names import fit
from lowrank_core.files.tensors import read_shapes

FOLDER_OF: dict[Component, str] = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
"""Of a diffusers pipeline."""
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def weight_files(base: Path) -> dict[Component, list[Path]]:
    """The safetensors files of each model in a folder: of a diffusers pipeline, or of one model; or the one file given.

    Of variants (`.fp16.`) beside a whole model, the whole model is taken.

    Raises:
        LowrankError: there are none.
    """
    if base.is_file():
        return {"": [base]}
    found: dict[Component, list[Path]] = {}
    for component, folder in FOLDER_OF.items():
        if files := _files(base / folder):
            found[component] = files
    if not found and (files := _files(base)):
        found = {"": files}
    if not found:
        raise LowrankError(
            f"there are no safetensors weights in {base}; give the folder of a model or of a diffusers pipeline"
        )
    return found


def _files(folder: Path) -> list[Path]:
    whole = [folder / name for name in _WHOLE if (folder / name).is_file()]
    return whole or sorted(folder.glob("*.safetensors"))


def base_layers(base: Path) -> dict[Component, Layers]:
    """The layers of each model in a folder, from the shapes in its files; no weight is read.

    A matrix counts as a linear layer and a larger tensor as a convolution, of one group as far as shapes tell.

    Raises:
        LowrankError: as `weight_files`, or a file is damaged.
    """
    return {
        component: {
            key.removesuffix(".weight"): geometry_of_shape(shape)
            for file in files
            for key, shape in read_shapes(file).items()
            if key.endswith(".weight") and len(shape) > 1
        }
        for component, files in weight_files(base).items()
    }


def geometry_of_shape(shape: tuple[int, ...]) -> Geometry:
    """The layer that a stored weight of this shape is, as far as the shape tells."""
    if len(shape) == 2:
        return Geometry("linear", *shape)
    return Geometry("conv", shape[0], shape[1], shape[2:])


def part_for(component: Component, available: Collection[Component], names: Collection[str]) -> Component:
    """Which model of a base an adapter is for.

    Raises:
        LowrankError: the base has no such model.
    """
    if component in available:
        return component
    if len(available) == 1:
        return next(iter(available))
    raise LowrankError(
        f"the adapter's {component or 'model'} is not in the base, which holds {', '.join(map(str, available))}; "
        f"give the folder of the model that has {next(iter(names))}"
    )


def fitted(file: AdapterFile, layers: Layers) -> AdapterFile:
    """The file with its modules under the names that this base gives them.

    Raises:
        LowrankError: modules that the base does not have.
    """
    return file.renamed(fit(file.modules, file.component, layers))
