"""From scores and a budget to the directions that stay."""

# torch leaves the types of a few of its methods partly open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from collections.abc import Sequence

import torch
from torch import Tensor


def allocate(scores: Sequence[Sequence[Tensor]], budget: int, least: int = 0) -> list[list[Tensor]]:
    """Which directions of each layer stay when `budget` of all do: boolean masks of the scores' shapes.

    scores: for each layer, for each of its sides, one number a direction. A layer of one side (AdaLoRA) keeps those of
    its directions that are among the `budget` greatest of all layers; of equal ones, the first.

    A layer of two sides (LoHa's two terms) must keep equally many on both. Within a term the order of directions
    means nothing, so each term's are ranked by themselves, and the n-th best of one goes with the n-th best of the
    other: their sum is what the pair competes with.

    least: what every layer keeps whatever its scores; times the number of layers, at most the budget.

    Computed where the scores are, without waiting for the device.
    """
    device = scores[0][0].device
    orders = [[torch.sort(side, descending=True, stable=True) for side in sides] for sides in scores]
    pairs = [torch.stack([order.values.to(device) for order in sides]).sum(0) for sides in orders]
    for pair in pairs:
        pair[:least] = torch.inf
    joined = torch.cat(pairs)
    stays = torch.zeros(len(joined), dtype=torch.bool, device=device)
    stays[torch.sort(joined, descending=True, stable=True).indices[:budget]] = True
    masks: list[list[Tensor]] = []
    # A layer's pairs are sorted, and equal ones stay in order, so what stays of them is a beginning.
    for sides, kept in zip(orders, stays.split([len(pair) for pair in pairs]), strict=True):
        masks.append([torch.empty_like(kept).scatter_(0, order.indices.to(device), kept) for order in sides])
    return [
        [mask.to(side.device) for mask, side in zip(found, sides, strict=True)]
        for found, sides in zip(masks, scores, strict=True)
    ]
