"""A CLIP tokenizer with a small vocabulary: every byte, and the words that the drawings' captions are made of."""

from typing import Any

from transformers import CLIPTokenizer

from lowrank_diffusion.tiny.drawings import all_words
from lowrank_diffusion.tiny.networks import TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def tiny_tokenizer() -> CLIPTokenizer:
    """One token for each word of `all_words`, letters for any other text; padded with the end token, as SDXL's first.

    The end token has the largest number, because SDXL's second encoder pools where the number is largest.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + _WORD_END for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in all_words():
        pieces = _pieces(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            vocabulary.append(pieces[0])
    vocabulary += [START, END]
    # Its annotations allow a file's name alone.
    make: Any = CLIPTokenizer
    return make(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """What the merges so far make of a word; those added later never touch a word that is one piece by then."""
    pieces = [*word[:-1], word[-1] + _WORD_END]
    for pair in merges:
        place = 0
        while place < len(pieces) - 1:
            if (pieces[place], pieces[place + 1]) == pair:
                pieces[place : place + 2] = ["".join(pair)]
            place += 1
    return pieces
