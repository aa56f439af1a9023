"""Pixel arrays made into `Examples`."""

import numpy as np
import torch

from lowrank_fl.data.examples import Examples

_BYTE_VALUES = 256


def picture_examples(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...],
    groups: np.ndarray | None = None,
    white: int = 255,
) -> Examples:
    """Examples of pixels: `train` and `test` are uint8 `(n, channels, height, width)` and labels `(n,)`."""
    pixels, labels = train
    test_pixels, test_labels = test
    mean, std = pixel_statistics(pixels)
    return Examples(
        name=name,
        inputs=torch.from_numpy(np.ascontiguousarray(pixels)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        test_inputs=torch.from_numpy(np.ascontiguousarray(test_pixels)),
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
        classes=classes,
        mean=mean,
        std=std,
        groups=groups,
        white=white,
    )


def pixel_statistics(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of `(n, channels, height, width)` bytes.

    Exact, from the counts of the 256 byte values, so that no float copy of the pixels is made.
    A channel that never changes gets the deviation 1, which `Examples.normalize` can divide by.
    """
    values = np.arange(_BYTE_VALUES)
    means, stds = [], []
    for channel in range(pixels.shape[1]):
        counts = np.zeros(_BYTE_VALUES, dtype=np.int64)
        # In pieces: bincount turns its input into 8-byte integers.
        for start in range(0, len(pixels), 4096):
            piece = pixels[start : start + 4096, channel]
            counts += np.bincount(piece.reshape(-1), minlength=_BYTE_VALUES)
        mean = (values * counts).sum() / counts.sum()
        variance = ((values - mean) ** 2 * counts).sum() / counts.sum()
        means.append(float(mean))
        stds.append(float(np.sqrt(variance)) or 1.0)
    return tuple(means), tuple(stds)
