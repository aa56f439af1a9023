"""Words of our own in prompts: each stands for vectors in place of token embeddings (textual inversion).

A base's tokenizers and its tables of embeddings stay as they are. A copy of a tokenizer finds the words, an ordinary
token keeps their places, and what the embedding layer gives there is replaced. So no token reaches an encoder that has
a greater number than the end token: where a configuration has the end token wrong, as SDXL's own has, transformers
pools at the greatest number.
"""

import copy
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_core.errors import UsageError
from lowrank_diffusion.families import SDXL, family_of

PARTS = ("clip_l", "clip_g")
"""What files call the embeddings of the first and of the second text encoder; ComfyUI's and A1111's names."""


def word_file(name: str) -> str:
    """The file of a run's word, by the run's name."""
    return f"{name}_embedding.safetensors"


class Word(nn.Module):
    """A word, in lower case, and its vectors by `PARTS`: `(n, 768)` and `(n, 1280)` for SDXL, fp32."""

    def __init__(self, text: str, vectors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.text = text.lower()
        self._vectors = nn.ParameterDict({part: nn.Parameter(vectors[part].detach().float()) for part in PARTS})
        self.is_silent = False

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        return {part: self._vectors[part] for part in PARTS}

    @property
    def tokens(self) -> list[str]:
        """A token for each vector, named as diffusers does."""
        return [self.text, *(f"{self.text}_{number}" for number in range(1, len(self.vectors[PARTS[0]])))]

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Within, the word is read as the base alone would read it."""
        self.is_silent = True
        try:
            yield
        finally:
            self.is_silent = False


def sdxl_encoders(pipeline: Any, option: str) -> list[tuple[str, Any, Any]]:
    """Each of `PARTS` with its tokenizer and encoder.

    Raises:
        UsageError: the pipeline is no SDXL; `option` is what asks for words.
    """
    family = family_of(pipeline)
    if family is not SDXL:
        raise UsageError(f"{option} is for SDXL's two text encoders, and this base is {family.name}; leave it out")
    names = zip(PARTS, family.tokenizers, family.encoders, strict=True)
    return [(part, getattr(pipeline, tokenizer), getattr(pipeline, encoder)) for part, tokenizer, encoder in names]


def knows(tokenizer: Any, word: str) -> bool:
    """Whether a tokenizer has a token for just this word, which then means something already."""
    return word in tokenizer.get_vocab() or len(tokenizer.tokenize(word)) == 1


class Reader:
    """A tokenizer with its encoder, which read words beside the tokenizer's own tokens.

    What they give is what diffusers' pipeline gives after `load_textual_inversion`, with the text pooled at its end.
    """

    def __init__(self, tokenizer: Any, encoder: Any, part: str, words: Sequence[Word]) -> None:
        self.encoder = encoder
        self._tokenizer, self._part, self._words = tokenizer, part, words
        if words:
            tokens = [token for word in words for token in word.tokens]
            self._knowing = copy.deepcopy(tokenizer)
            self._knowing.add_tokens(tokens)
            self._numbers: list[int] = self._knowing.convert_tokens_to_ids(tokens)
            longest_first = sorted(words, key=lambda word: len(word.text), reverse=True)
            # A group for each word, since what matches without regard to case need not become the word by lower().
            self._pattern = re.compile("|".join(f"({re.escape(word.text)})" for word in longest_first), re.IGNORECASE)
            self._spelled = [" ".join(word.tokens) for word in longest_first]

    def __call__(self, captions: Sequence[str]) -> Any:
        """The encoder's output for captions, with gradients where they are enabled."""
        tokenizer, texts = self._spell(captions)
        numbers: Tensor = tokenizer(
            texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        # DistributedDataParallel has no attribute for its device.
        device = next(self.encoder.parameters()).device
        if tokenizer is self._tokenizer:
            return self.encoder(numbers.to(device), output_hidden_states=True)
        places = torch.full_like(numbers, -1)
        for place, number in enumerate(self._numbers):
            places[numbers == number] = place
        # The start token stands at each text's head already, so here it never is what pooling looks for.
        numbers[places >= 0] = tokenizer.bos_token_id
        vectors = torch.cat([word.vectors[self._part] for word in self._words])
        with _replaced(self.encoder.get_input_embeddings(), places.to(device), vectors):
            return self.encoder(numbers.to(device), output_hidden_states=True)

    def is_too_long(self, caption: str) -> bool:
        """Whether the encoder reads only a caption's beginning."""
        tokenizer, (text,) = self._spell([caption])
        return len(tokenizer(text, verbose=False).input_ids) > tokenizer.model_max_length

    def _spell(self, captions: Sequence[str]) -> tuple[Any, list[str]]:
        """A tokenizer, and the captions as it is to read them: each word as all of its tokens."""
        if not self._words or any(word.is_silent for word in self._words):
            return self._tokenizer, list(captions)
        return self._knowing, [
            self._pattern.sub(lambda found: self._spelled[cast(int, found.lastindex) - 1], caption)
            for caption in captions
        ]


@contextmanager
def _replaced(embedding: nn.Module, places: Tensor, vectors: Tensor) -> Generator[None]:
    """Within, a layer of embeddings gives `vectors[place]` for tokens whose place is not -1.

    Also where no token has a place are the vectors part of the graph, so that their gradients are zeros in one process
    as in another.
    """

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own = functional.embedding(places.clamp(min=0), vectors.to(output.dtype))
        return torch.where(places[..., None] >= 0, own, output)

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
