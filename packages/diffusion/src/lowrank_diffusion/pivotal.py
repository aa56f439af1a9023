"""Pivotal tuning: a new word's embeddings are trained with the adapter up to a step, the pivot; then the adapter alone.

Textual inversion is of Gal et al. (https://arxiv.org/abs/2208.01618), the pivot of Roich et al.
(https://arxiv.org/abs/2106.05744), who invert first and tune afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_core.errors import UsageError
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.data.captions import Captions
from lowrank_diffusion.seeds import derive_seed
from lowrank_diffusion.words import PARTS, Word, knows, sdxl_encoders


class NewWord(Word):
    """A word under training."""

    def __init__(
        self, text: str, vectors: Mapping[str, Tensor], spreads: Mapping[str, float], pivot: int, hold: float
    ) -> None:
        """Begin with these vectors.

        Args:
            text: the word.
            vectors: see `Word`.
            spreads: the standard deviations of the base's own embeddings, by `PARTS`.
            pivot: so many steps train the vectors.
            hold: `pivotal.hold_spread`.
        """
        super().__init__(text, vectors)
        self.spreads, self.pivot, self.hold = spreads, pivot, hold

    def begin(self, step: int) -> None:
        """Before optimizer step `step`, counted from 0: the vectors are trained or not."""
        self.requires_grad_(step < self.pivot)

    @torch.no_grad()
    def end(self) -> None:
        """After an optimizer step: the standard deviation s of the vectors becomes s (t/s)^hold, t the base's own.

        Embeddings that grow drown the rest of a caption. The exponent 0.1 is that of diffusers' advanced script.
        """
        for part, vectors in self.vectors.items():
            if vectors.requires_grad and self.hold:
                vectors *= (self.spreads[part] / vectors.std(correction=0)) ** self.hold


def new_word(config: DiffusionConfig, pipeline: Any) -> NewWord | None:
    """The word of `pivotal`, if there is one: its vectors those of `pivotal.init`, or drawn from the run's seed.

    Raises:
        UsageError: the base is no SDXL, its tokenizers know the word already, or `pivotal.init` is none of their
            tokens.
    """
    settings = config.pivotal
    if settings.token is None:
        return None
    vectors, spreads = dict[str, Tensor](), dict[str, float]()
    for part, tokenizer, encoder in sdxl_encoders(pipeline, "pivotal.token"):
        if knows(tokenizer, settings.token.lower()):
            raise UsageError(
                f"pivotal.token is {settings.token}, a word that the base's tokenizer knows already; choose one that "
                f"it does not, such as <{settings.token}>"
            )
        table: Tensor = encoder.get_input_embeddings().weight.detach().float()
        spreads[part] = table.std(correction=0).item()
        if settings.init is None:
            generator = torch.Generator().manual_seed(derive_seed(config.seed, "pivotal", PARTS.index(part)))
            vectors[part] = spreads[part] * torch.randn(settings.vectors, table.shape[1], generator=generator)
        else:
            vectors[part] = table[_token_of(tokenizer, settings.init)].repeat(settings.vectors, 1)
    pivot = max(1, round(settings.until * config.train.steps))
    return NewWord(settings.token, vectors, spreads, pivot, settings.hold_spread)


def _token_of(tokenizer: Any, word: str) -> int:
    tokens = tokenizer.tokenize(word)
    if len(tokens) != 1:
        raise UsageError(
            f"pivotal.init is {word!r}, which the base's tokenizer reads as {len(tokens)} tokens; give a word of one, "
            "or leave it out to start from random embeddings"
        )
    return tokenizer.convert_tokens_to_ids(tokens)[0]


def check_captions(config: DiffusionConfig, captions: Sequence[str], note: Callable[[str], None]) -> None:
    """Refuse a run whose word stands in none of its captions; `note` where it stands in none of its prompts.

    Raises:
        UsageError: so it is.
    """
    token = config.pivotal.token
    if token is None:
        return

    def have_it(texts: Sequence[str]) -> bool:
        return any(token.lower() in text.lower() for text in texts)

    if not have_it(Captions(config.data, config.seed).all_of(captions)):
        raise UsageError(
            f"pivotal.token is {token}, which stands in no caption, so nothing would be learned for it; set "
            f"data.trigger: {token}, or write it into captions"
        )
    if config.sample.prompts and not have_it(config.sample.prompts):
        note(f"pivotal.token {token} stands in none of sample.prompts, so the grids will not show what it learns")
