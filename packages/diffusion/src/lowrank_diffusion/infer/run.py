"""`lowrank infer` for adapters: from paths and prompts to a folder of pictures."""

from datetime import datetime
from pathlib import Path

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.infer.request import Request, check
from lowrank_diffusion.infer.studio import Drawn, Studio, Told, means_of


def infer(request: Request, told: Told) -> Drawn:
    """Draw pictures and write them, each with its recipe.

    Raises:
        UsageError: a request that cannot be meant, such as a size that is no multiple of 8.
        LowrankError: adapters or a base that cannot be read or do not fit each other, a folder that holds files
            already, a picture that comes out as NaN, a full disk.
    """
    if not request.adapters and not request.embeddings:
        raise UsageError("infer takes an adapter: the folder of a run, a PEFT folder or a .safetensors file")
    means = means_of(request, told.note)
    check(request)
    out = free_folder(request.out)
    return Studio(means, request, told.note, once=True).draw(request, out, told)


def free_folder(out: Path | None) -> Path:
    """A new or empty folder for pictures: `out`, or else one of runs/.

    Raises:
        LowrankError: `out` is a file or holds files.
    """
    if out is None:
        stem = Path("runs") / f"pictures-{datetime.now():%Y%m%d-%H%M%S}"
        numbered = (stem.with_name(f"{stem.name}-{number}") for number in range(2, 1000))
        return stem if not stem.exists() else next(path for path in numbered if not path.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "already holds files" if out.is_dir() else "is a file"
        raise LowrankError(f"{out} {kind}; choose a new or empty folder with --out")
    return out
