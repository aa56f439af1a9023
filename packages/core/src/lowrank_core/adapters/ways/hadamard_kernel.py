"""ΔW of LoHa in one pass on a GPU: both products stay in registers, and only the result is written.

The plain composition writes and reads two intermediate weights; this moves a quarter of those bytes.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_OUT, _BLOCK_IN = 64, 128


def compose_hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The scaled (A1 B1) ⊙ (A2 B2), `(out, in)`, in `dtype`; summed in float32. Not differentiable.

    a1, a2: `(out, r)`; b1, b2: `(r, in)`; contiguous, of one dtype.
    """
    (outputs, rank), inputs = a1.shape, b1.shape[1]
    out = torch.empty(outputs, inputs, dtype=dtype, device=a1.device)
    grid = (triton.cdiv(outputs, _BLOCK_OUT), triton.cdiv(inputs, _BLOCK_IN))
    padded = max(16, triton.next_power_of_2(rank))  # tensor cores multiply no fewer than 16
    _compose[grid](a1, b1, a2, b2, out, scale, outputs, inputs, rank, _BLOCK_OUT, _BLOCK_IN, padded)
    return out


@triton.jit
def _compose(
    a1,
    b1,
    a2,
    b2,
    out,
    scale,
    outputs,
    inputs,
    rank,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    RANK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    ranks = tl.arange(0, RANK)
    left = rows[:, None] * rank + ranks[None, :]
    left_mask = (rows[:, None] < outputs) & (ranks[None, :] < rank)
    right = ranks[:, None] * inputs + columns[None, :]
    right_mask = (ranks[:, None] < rank) & (columns[None, :] < inputs)
    first = tl.dot(tl.load(a1 + left, left_mask, 0.0), tl.load(b1 + right, right_mask, 0.0), input_precision="ieee")
    second = tl.dot(tl.load(a2 + left, left_mask, 0.0), tl.load(b2 + right, right_mask, 0.0), input_precision="ieee")
    target = rows[:, None].to(tl.int64) * inputs + columns[None, :]
    target_mask = (rows[:, None] < outputs) & (columns[None, :] < inputs)
    tl.store(out + target, (scale * first * second).to(out.dtype.element_ty), target_mask)
