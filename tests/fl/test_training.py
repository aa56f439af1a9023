"""A client's training against torch's own optimizer and formulas."""

import pytest
import torch
import torch.nn.functional as F
from cases import equal_parts, how, small_examples, small_model
from torch import nn

from lowrank_core import LowrankError, factorize
from lowrank_fl.drift import Drift
from lowrank_fl.seeds import derive_seed
from lowrank_fl.state import transferred
from lowrank_fl.steps import SGD, backward
from lowrank_fl.training import Trainer


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.filterwarnings("default")
def test_sgd_takes_the_steps_of_torchs_sgd(momentum, weight_decay):
    models = [small_model().double().eval() for _ in range(2)]
    theirs = torch.optim.SGD(models[0].parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    ours = SGD(list(models[1].parameters()), 0.1, momentum, weight_decay)
    x, y = torch.randn(8, 64, dtype=torch.float64), torch.arange(8) % 3
    for _ in range(4):
        for model, optimizer in zip(models, (theirs, ours), strict=True):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for expected, got in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_a_client_trains_the_same_whatever_was_trained_before_it():
    examples = small_examples()
    trainer = Trainer(small_model(), examples, equal_parts(examples, 4), how())
    start = {name: tensor.clone().numpy() for name, tensor in trainer.state.items()}

    def train(client):
        trainer.load(start)
        trainer.train(client, 3, 0.05)
        return {name: tensor.clone() for name, tensor in trainer.state.items()}

    first = train(1)
    other = train(2)
    assert all(torch.equal(tensor, first[name]) for name, tensor in train(1).items())
    assert not torch.equal(other["1.weight"], first["1.weight"])


def test_one_epoch_of_one_batch_is_one_gradient_step():
    examples = small_examples(8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    by_hand = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    by_hand.load_state_dict(model.state_dict())
    trainer = Trainer(model, examples, equal_parts(examples, 1), how(epochs=1, batch_size=8))
    trained = trainer.train(0, 1, 0.1)
    expected_loss = F.cross_entropy(by_hand(examples.normalize(examples.inputs)), examples.labels)
    expected_loss.backward()
    assert (trained.examples, trained.steps) == (8, 1)
    assert trained.loss == pytest.approx(expected_loss.item(), rel=1e-5)
    for parameter, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected - 0.1 * expected.grad, rtol=1e-5, atol=1e-6)


def test_the_proximal_term_pulls_towards_the_servers_model():
    examples = small_examples()
    moved = []
    for mu in (0.0, 10.0):
        trainer = Trainer(small_model(), examples, equal_parts(examples, 4), how(epochs=5))
        start = trainer.state["1.weight"].clone()
        trainer.train(0, 1, 0.05, Drift(proximal=mu))
        moved.append((trainer.state["1.weight"] - start).norm().item())
    assert moved[1] < 0.5 * moved[0]


def test_the_jacobian_correction_adds_its_gradient_and_not_its_value():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    factorize(model, "fedpara", rank=1)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    gradients, losses = [], []
    for strength in (0.0, 1.0, 2.0):
        model.zero_grad()
        losses.append(backward(model, x, y, 0.1, strength).item())
        gradients.append(model[1].weight.x1.grad.clone())
    assert losses[0] == losses[1] == losses[2]
    torch.testing.assert_close(gradients[2] - gradients[0], 2 * (gradients[1] - gradients[0]))
    assert not torch.equal(gradients[1], gradients[0])


def test_a_model_without_hadamard_weights_has_no_correction():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    backward(model, torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), 0.1, 1.0)
    assert model[1].weight.grad is not None


def test_divergence_is_an_error_that_names_the_client_and_the_rate():
    examples = small_examples()
    trainer = Trainer(small_model(), examples, equal_parts(examples, 4), how(lr=1e30, epochs=9))
    with pytest.raises(LowrankError, match="training diverged: client 2 has loss nan in round 5"):
        trainer.train(2, 5, 1e30)


def test_evaluation_counts_right_answers_and_sums_losses_slice_by_slice():
    examples = small_examples()
    trainer = Trainer(small_model(), examples, equal_parts(examples, 4), how())
    correct, loss = trainer.evaluate(0)
    logits = trainer.model.eval()(examples.normalize(examples.test_inputs))
    assert correct == int((logits.argmax(1) == examples.test_labels).sum())
    assert loss == pytest.approx(F.cross_entropy(logits, examples.test_labels, reduction="sum").item(), rel=1e-6)
    assert trainer.evaluate(500) == (0, 0.0)


def test_counters_stay_with_the_client():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert set(transferred(model)) == {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_seeds_differ_by_purpose_round_and_client_and_by_nothing_else():
    seeds = {derive_seed(1, "client", r, c) for r in range(1, 20) for c in range(20)}
    assert len(seeds) == 19 * 20
    assert derive_seed(1, "model") not in {derive_seed(1, "partition"), derive_seed(2, "model")}
    assert derive_seed(1, "client", 2, 3) == derive_seed(1, "client", 2, 3)
