"""Clients that train under autocast against those that do not."""

from dataclasses import replace

import pytest
import torch
from cases import equal_parts, how, small_examples
from test_batched import UNEQUAL, mlp
from test_compiled import network
from test_run import Watcher
from torch import nn

from lowrank_fl.execution.batched import BatchedTrainer
from lowrank_fl.load import load_config
from lowrank_fl.run import resume, run
from lowrank_fl.training import Trainer


def trained(kind, model, parts, local):
    """What training client 1 comes to, the numbers it ends with, and the answers to the server's test."""
    trainer = kind(model, small_examples(), parts, local)
    products = []

    def seen(module, _, output):
        products.append(output.dtype)
        assert module.weight.dtype == torch.float32

    hooks = [m.register_forward_hook(seen) for m in trainer.model.modules() if type(m) in (nn.Linear, nn.Conv2d)]
    trainer.expect([0, 1])
    outcome = trainer.train(1, 1, 0.02)
    answers = trainer.evaluate(0)
    for hook in hooks:
        hook.remove()
    return outcome, {name: tensor.clone() for name, tensor in trainer.state.items()}, answers, set(products)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_half_of_the_bits_end_near_all_of_them(strength):
    parts = equal_parts(small_examples(), 4)
    both = [
        trained(
            Trainer,
            network(),
            parts,
            replace(how(precision=precision, epochs=1, batch_size=8), jacobian_lambda=strength),
        )
        for precision in ("fp32", "bf16")
    ]
    (full, ends, answers, wide), (half, near, close, narrow) = both
    assert wide == {torch.float32}
    assert narrow == {torch.bfloat16}
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert half.loss != full.loss
    assert close[1] == pytest.approx(answers[1], rel=0.02)
    begun = network().state_dict()
    for name, expected in ends.items():
        assert near[name].dtype == torch.float32
        moved = (expected - begun[name]).norm()
        assert (near[name] - expected).norm() <= 0.05 * moved + 1e-4, name


def test_clients_trained_together_do_so_in_half_of_the_bits_too():
    local = how(precision="bf16", momentum=0.5)
    alone, ends, _, _ = trained(Trainer, mlp("fedpara"), UNEQUAL, local)
    together, near, _, _ = trained(BatchedTrainer, mlp("fedpara"), UNEQUAL, local)
    assert together.loss == pytest.approx(alone.loss, rel=0.01)
    for name, expected in ends.items():
        torch.testing.assert_close(near[name], expected, rtol=0.02, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["original", "fedpara", "pfedpara"])
def test_a_run_in_half_of_the_bits_sends_as_many_and_is_resumed_to_the_bit(tmp_path, kind):
    small = ["model.name=mlp", "model.width=8", "data.max_examples=120", "federation.clients=3", "sweep={}"]
    small += ["federation.clients_per_round=3", "engine.workers=1", f"model.method={kind}"]
    small += ["partition.held_out=0.2"] if kind == "pfedpara" else []
    runs = {}
    for precision in ("fp32", "bf16"):
        keys = [*small, "rounds=2", f"federation.precision={precision}"]
        (runs[precision],) = run(load_config("quickstart", keys), tmp_path / precision, Watcher())
    assert runs["bf16"].total_bytes == runs["fp32"].total_bytes
    run(load_config("quickstart", [*small, "rounds=1", "federation.precision=bf16"]), tmp_path / "short", Watcher())
    resume(tmp_path / "short", Watcher(), ["rounds=2"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fp32", "bf16", "short")]
    assert weights[1] == weights[2] != weights[0]
