"""Texts made into `Examples`."""

from pathlib import Path

import numpy as np
import torch

from lowrank_fl.config import DataConfig
from lowrank_fl.data.examples import Examples
from lowrank_fl.models.pretrained import tokenize


def text_examples(
    data: DataConfig,
    train: tuple[list[str], np.ndarray],
    test: tuple[list[str], np.ndarray],
    classes: tuple[str, ...],
    groups: np.ndarray | None = None,
) -> Examples:
    """Examples of tokens, all padded to the longest text; `train` and `test` are texts and labels `(n,)`.

    Raises:
        LowrankError: the folder `data.tokenizer` has no usable tokenizer.
    """
    (texts, labels), (test_texts, test_labels) = train, test
    assert data.tokenizer is not None
    # Together, because they are to be of one length.
    tokens = tokenize(texts + test_texts, Path(data.tokenizer), data.max_tokens)
    return Examples(
        name=data.name,
        inputs=tokens[: len(texts)],
        labels=torch.from_numpy(labels.astype(np.int64)),
        test_inputs=tokens[len(texts) :],
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
        classes=classes,
        groups=groups,
    )
