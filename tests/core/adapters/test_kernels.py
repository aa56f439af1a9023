"""The Triton kernel against the plain composition: in Triton's interpreter, and itself where there is CUDA."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from lowrank_core.adapters.forms import LoHaForm
from lowrank_core.adapters.forward import adapted
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.kernels import compose, use_kernels

PROGRAM = """
import torch
from lowrank_core.adapters.ways.hadamard_kernel import compose_hadamard
torch.manual_seed(0)
for outputs, inputs, rank in ((70, 130, 3), (64, 128, 16), (33, 40, 20), (65, 5, 128)):
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


# No multiples of the blocks; one that lies in a single block; one whose last block of columns holds one.
SIZES = [(70, 130), (33, 40), (640, 1281)]
PRECISIONS = [
    pytest.param(torch.float32, torch.float32, 1e-6, id="float32"),
    pytest.param(torch.float32, torch.bfloat16, 4e-3, id="float32 to bfloat16"),  # as layers have it
    pytest.param(torch.bfloat16, torch.bfloat16, 4e-3, id="bfloat16"),
    pytest.param(torch.float16, torch.float16, 5e-4, id="float16"),
]


@pytest.mark.parametrize(("held", "wanted", "tolerance"), PRECISIONS)
def test_on_a_gpu_the_kernel_composes_what_the_formula_does(
    cuda: torch.device, held: torch.dtype, wanted: torch.dtype, tolerance: float
) -> None:
    from lowrank_core.adapters.ways.hadamard_kernel import compose_hadamard

    for (outputs, inputs), rank in itertools.product(SIZES, [1, 3, 16, 20, 64, 100, 128]):
        a1, a2 = torch.randn(2, outputs, rank, device=cuda, dtype=held)
        b1, b2 = torch.randn(2, rank, inputs, device=cuda, dtype=held)
        exact = 0.5 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
        composed = compose_hadamard(a1, b1, a2, b2, 0.5, wanted)
        assert composed.dtype == wanted
        assert (composed.double() - exact).norm() <= tolerance * exact.norm(), (outputs, inputs, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_layer_with_the_kernel_gives_what_it_gives_without(cuda: torch.device, dtype: torch.dtype) -> None:
    with cuda:
        geometry = Geometry("linear", 70, 130)
        weight, x = torch.randn(70, 130, dtype=dtype), torch.randn(9, 130, dtype=dtype, requires_grad=True)
        shapes = LoHaForm().shapes(geometry, 5)
        factors = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    found = []
    try:
        for asked in (False, True):
            use_kernels(asked)
            out = adapted(x, weight, None, LoHaForm(), factors, 0.5, geometry, way="dense")
            found.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *factors.values()])])
    finally:
        use_kernels(False)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for with_kernel, without in zip(*reversed(found), strict=True):
        assert (with_kernel - without).norm() <= tolerance * without.norm()
