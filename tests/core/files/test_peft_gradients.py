"""PEFT's gradient of a LoHa's Tucker form, which is wrong; the test says when it no longer is."""

import warnings

import torch

from lowrank_core import LoHa
from lowrank_core.adapters.geometry import Geometry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft.tuners.loha.layer import make_weight_cp  # pyright: ignore


def test_peft_still_mixes_up_the_sides_in_the_tucker_gradient():
    """If this fails, PEFT has mended it: patch_peft then need not replace that backward."""
    conv = torch.nn.Conv2d(5, 6, 3).double()
    geometry = Geometry.of(conv)
    form = LoHa(target_modules=[], tucker=True).form
    factors = {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in form.shapes(geometry, 2).items()
    }
    arguments = [factors[f"hada_{key}"] for key in ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")]
    theirs = make_weight_cp(*arguments, torch.ones((), dtype=torch.float64))
    ours = form.compose(factors, geometry)
    torch.testing.assert_close(theirs, ours)
    out = torch.randn_like(ours)
    wanted = torch.autograd.grad(ours, list(factors.values()), out, retain_graph=True)
    found = torch.autograd.grad(theirs, list(factors.values()), out)
    wrong = [name for name, a, b in zip(factors, wanted, found, strict=True) if not torch.allclose(a, b)]
    assert wrong == ["hada_w1_a", "hada_w2_a"]
