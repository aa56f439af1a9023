"""Reading an adapter of any form: which form it is, is seen from the files."""

from pathlib import Path

from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import AdapterFile
from lowrank_core.files.check import some
from lowrank_core.files.diffusers_file import WEIGHTS_NAME as DIFFUSERS_NAME
from lowrank_core.files.diffusers_file import is_diffusers, read_diffusers
from lowrank_core.files.kohya import is_kohya, read_kohya
from lowrank_core.files.names import Names
from lowrank_core.files.peft import COMPONENT_OF_FOLDER, CONFIG_NAME, read_peft
from lowrank_core.files.tensors import read_tensors


def read(path: Path | str, known: Names | None = None, *, whole: bool = False) -> list[AdapterFile]:
    """The adapters at a path, one for each model that they are for.

    A folder is PEFT's, or holds PEFT folders for the models of a pipeline (`unet`, `text_encoder_one`, ...), or
    diffusers' `pytorch_lora_weights.safetensors`. A file is kohya's, LyCORIS's or ComfyUI's, or diffusers'.

    known: the names of the modules of the models at hand; only what is for them is read then, except from PEFT folders.
    whole: raise instead of leaving out what is for another model.

    Raises:
        LowrankError: there is nothing, or nothing that is an adapter; a pickle; a damaged file; keys that belong to
            nothing; factors that do not fit together.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, known, whole)
    if path.name == CONFIG_NAME or (path.name.startswith("adapter_model.") and (path.parent / CONFIG_NAME).is_file()):
        return [read_peft(path.parent)]
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise LowrankError(f"{path} holds no tensors; give the file of a trained adapter")
    if is_kohya(tensors):
        return _some(read_kohya(tensors, metadata, path, known, whole=whole), path)
    if is_diffusers(tensors):
        return _some(read_diffusers(tensors, metadata, path, known, whole=whole), path)
    if any(key.startswith("base_model.model.") for key in tensors):
        raise LowrankError(f"{path} is the weights of a PEFT folder; put its {CONFIG_NAME} beside it")
    raise LowrankError(
        f"{path} is no LoRA, LoHa, LoKr or AdaLoRA in the form of PEFT, kohya, LyCORIS or diffusers; "
        f"its keys are {some(tensors, 3)}"
    )


def _read_folder(folder: Path, known: Names | None, whole: bool) -> list[AdapterFile]:
    if (folder / CONFIG_NAME).is_file():
        return [read_peft(folder)]
    parts = [folder / name for name in COMPONENT_OF_FOLDER if (folder / name / CONFIG_NAME).is_file()]
    if parts:
        return [read_peft(part) for part in parts]
    if (folder / DIFFUSERS_NAME).is_file():
        return read(folder / DIFFUSERS_NAME, known, whole=whole)
    if any(folder.glob("adapter_model.*")):
        return [read_peft(folder)]  # which says that the JSON is missing
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    hint = f"name one of its files: {some(files)}" if files else "give a PEFT folder or a safetensors file"
    raise LowrankError(f"{folder} holds no {CONFIG_NAME}; {hint}")


def _some(files: list[AdapterFile], path: Path) -> list[AdapterFile]:
    if not files:
        raise LowrankError(f"{path} holds nothing for this model; give the adapter of it")
    return files
