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

# Ranks go 16 at a time, the fewest that tensor cores multiply, so that a block holds as much for every rank. In
# float32, where they do not help, more would not fit in the registers.
_BLOCK_OUT, _BLOCK_IN, _BLOCK_RANK = 64, 128, 16


def compose_hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The scaled (A1 B1) ⊙ (A2 B2), `(out, in)`, in `dtype`; summed in float32. Not differentiable.

    a1, a2: `(out, r)`; b1, b2: `(r, in)`; contiguous, of one dtype of at most 32 bits.
    """
    (outputs, rank), inputs = a1.shape, b1.shape[1]
    out = torch.empty(outputs, inputs, dtype=dtype, device=a1.device)
    grid = (triton.cdiv(outputs, _BLOCK_OUT), triton.cdiv(inputs, _BLOCK_IN))
    with torch.cuda.device_of(a1):  # Triton launches on the current one
        _compose[grid](a1, b1, a2, b2, out, scale, outputs, inputs, rank, _BLOCK_OUT, _BLOCK_IN, _BLOCK_RANK)
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
    BLOCK_RANK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    first = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    second = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        ranks = start + tl.arange(0, BLOCK_RANK)
        left = rows[:, None] * rank + ranks[None, :]
        left_mask = (rows[:, None] < outputs) & (ranks[None, :] < rank)
        right = ranks[:, None] * inputs + columns[None, :]
        right_mask = (ranks[:, None] < rank) & (columns[None, :] < inputs)
        x1, y1 = tl.load(a1 + left, left_mask, 0.0), tl.load(b1 + right, right_mask, 0.0)
        x2, y2 = tl.load(a2 + left, left_mask, 0.0), tl.load(b2 + right, right_mask, 0.0)
        first = tl.dot(x1, y1, first, input_precision="ieee")
        second = tl.dot(x2, y2, second, input_precision="ieee")
    target = rows[:, None].to(tl.int64) * inputs + columns[None, :]
    target_mask = (rows[:, None] < outputs) & (columns[None, :] < inputs)
    tl.store(out + target, (scale * first * second).to(out.dtype.element_ty), target_mask)
