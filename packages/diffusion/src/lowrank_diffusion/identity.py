"""What tells one model, or one picture, from another, without reading all of it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_core.errors import LowrankError
from lowrank_diffusion.data.picture import Picture

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def source_identity(source: str, revision: str | None = None, parts: Sequence[str] = ()) -> dict[str, Any]:
    """A model's folder, file or hub id as JSON that changes when the model does.

    A hub id stands with the commit that is in the hub's cache, so load the model first. A folder stands with its path,
    the digests of its small files, and the sizes and times of its weights; a file as one of these, whole.

    Args:
        source: the folder, file or hub id, as `base.path` and `base.vae` have it.
        revision: of the hub's repository.
        parts: the subfolders that count, such as `text_encoder` and `tokenizer`; everything if empty.

    Raises:
        LowrankError: the folder holds none of these parts, or the hub's cache not the model.
    """
    folder = Path(source)
    if folder.is_file():
        return {"file": str(folder.resolve()), "content": _file_identity(folder)}
    if not folder.is_dir():
        return {"hub": source, "commit": _commit(source, revision), "parts": list(parts)}
    files = [file for part in parts or ("",) for file in sorted((folder / part).rglob("*")) if file.is_file()]
    if not files:
        raise LowrankError(f"{source} holds no {' or '.join(parts) or 'files'}; give the folder of a saved model")
    return {
        "folder": str(folder.resolve()),
        "files": {str(file.relative_to(folder)): _file_identity(file) for file in files},
    }


def _file_identity(file: Path) -> list[int] | str:
    if file.suffix in _WEIGHTS:
        status = file.stat()
        return [status.st_size, status.st_mtime_ns]
    return file_digest(file)


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _commit(repository: str, revision: str | None) -> str:
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "config.json"):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name
    raise LowrankError(
        f"{repository} is no folder, and the hub's cache does not hold it at revision {revision or 'main'}; "
        "check base.path, base.vae and base.revision"
    )


def content_digest(picture: Picture) -> str:
    """A SHA-256 of the picture's file, or of its pixels where it is drawn and has no file.

    Raises:
        LowrankError: the picture can no longer be opened.
    """
    try:
        with picture.open() as image:
            stream = getattr(image, "fp", None)
            if stream is not None:
                stream.seek(0)
                return hashlib.file_digest(stream, "sha256").hexdigest()
            drawn = hashlib.sha256(repr((image.mode, image.size, image.getpalette())).encode())
            drawn.update(image.tobytes())
            return drawn.hexdigest()
    except OSError as error:
        raise LowrankError(f"{picture.name} cannot be opened ({error}); mend it or take it out") from None
