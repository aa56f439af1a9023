"""The Triton kernel in Triton's interpreter, against the plain composition."""

import os
import subprocess
import sys

import pytest
import torch

from lowrank_core.adapters.forms import LoHaForm
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.kernels import compose, use_kernels

PROGRAM = """
import torch
from lowrank_core.adapters.ways.hadamard_kernel import compose_hadamard
torch.manual_seed(0)
for outputs, inputs, rank in ((70, 130, 3), (64, 128, 16), (33, 40, 20)):
    a1, a2, b1, b2 = (torch.randn(s) for s in ((outputs, rank),) * 2 + ((rank, inputs),) * 2)
    plain = 0.5 * (a1 @ b1) * (a2 @ b2)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        kernel = compose_hadamard(a1, b1, a2, b2, 0.5, dtype)
        assert kernel.dtype == dtype
        assert (kernel.float() - plain).norm() <= tolerance * plain.norm(), (outputs, inputs, rank, dtype)
print("agree")
"""


@pytest.mark.slow
def test_the_kernel_composes_what_the_plain_path_does() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout == "agree\n", done.stderr


def test_asking_for_kernels_changes_nothing_on_a_cpu() -> None:
    geometry = Geometry("linear", 6, 5)
    factors = {name: torch.randn(shape) for name, shape in LoHaForm().shapes(geometry, 2).items()}
    use_kernels()
    try:
        composed = compose(LoHaForm(), factors, 0.5, geometry, torch.float32)
    finally:
        use_kernels(False)
    assert torch.equal(composed, 0.5 * LoHaForm().compose(factors, geometry))
