"""Words that prompts may have: from the run folders that an adapter comes from, and from files of embeddings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files.tensors import read_tensors
from lowrank_diffusion.identity import file_digest
from lowrank_diffusion.infer.sources import Source
from lowrank_diffusion.words import PARTS, Word, knows, sdxl_encoders

_ENDING = ".safetensors"
_WORD = re.compile(r"[^\s,]+")
_MOST = 75
"""Vectors that fit between a text's start and its end."""


@dataclass(frozen=True)
class Embedding:
    """A file of embeddings and the word they are for."""

    path: Path
    word: Word

    @property
    def digest(self) -> str:
        """The file's SHA-256."""
        return file_digest(self.path)


def embeddings_of(sources: Sequence[Source], asked: Sequence[str]) -> list[Embedding]:
    """The words of runs that trained one, and those of `--embedding`.

    Args:
        sources: run folders among them bring their words.
        asked: FILE or FILE:WORD each.

    Raises:
        UsageError: two are for one word, or a word has a space or a comma in it.
        LowrankError: a file is missing, or holds no embeddings for SDXL.
    """
    found = [
        _read(source.embedding, source.run.pivotal.token)
        for source in sources
        if source.run is not None and source.embedding is not None
    ]
    for text in asked:
        path, ending, word = text.partition(f"{_ENDING}:")
        found.append(_read(Path(path + _ENDING), word) if ending else _read(Path(text), None))
    # A run may be named twice.
    found = list({(each.path, each.word.text): each for each in found}.values())
    by_token: dict[str, Path] = {}
    for each in found:
        for token in each.word.tokens:
            if (other := by_token.setdefault(token, each.path)) != each.path:
                raise UsageError(
                    f"{other} and {each.path} both bring the word {token}; leave one out, or give it another word, "
                    "as --embedding FILE:WORD"
                )
    return found


def check_words(pipeline: Any, embeddings: Sequence[Embedding]) -> list[Word]:
    """The words, on the pipeline's device, as its text encoders can take them.

    Raises:
        LowrankError: vectors are of another width than the base's embeddings.
        UsageError: the base is no SDXL, or its tokenizers know a word already.
    """
    encoders = sdxl_encoders(pipeline, "--embedding") if embeddings else []
    for each in embeddings:
        for part, tokenizer, encoder in encoders:
            width, own = each.word.vectors[part].shape[1], encoder.get_input_embeddings().embedding_dim
            if width != own:
                raise LowrankError(
                    f"{each.path} has embeddings {width} wide as {part}, and the base's are {own} wide; give one "
                    "that was trained for this base"
                )
            if knows(tokenizer, each.word.text):
                raise UsageError(
                    f"{each.path} would bring the word {each.word.text}, which the base's tokenizer knows already; "
                    f"name another, as --embedding FILE:<{each.word.text}>"
                )
    return [each.word.to(pipeline.device).requires_grad_(False) for each in embeddings]


def _read(path: Path, text: str | None) -> Embedding:
    tensors, about = read_tensors(path)
    if text is None:
        said = about.get("modelspec.trigger_phrase", "")
        text = said if _WORD.fullmatch(said) else path.stem
    if not _WORD.fullmatch(text):
        raise UsageError(f"{text!r} is no word for embeddings: it has a space or a comma; name one, as FILE:WORD")
    shapes = [tuple(tensors[part].shape) for part in PARTS if part in tensors]
    rows = {shape[0] for shape in shapes}
    if [len(shape) for shape in shapes] != [2, 2] or len(rows) != 1 or not 0 < min(rows) <= _MOST:
        named = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:3])
        raise LowrankError(
            f"{path} holds no embeddings for SDXL, which are as many rows, at most {_MOST}, of "
            f"{' and of '.join(PARTS)}: it has {named or 'nothing'}; give another file"
        )
    return Embedding(path, Word(text, tensors))
