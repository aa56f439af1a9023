"""Killed and resumed: the same bits as without the interruption."""

import io

import pytest
import torch
from adaptive_models import Products, Triplets, small_model, train, trained

from lowrank_core.adaptive import AdaptiveRank, adapt_ranks, fit_ranks, rank_pattern
from lowrank_core.errors import LowrankError
from lowrank_core.replacement import factorize

STEPS = 30
CONFIG = AdaptiveRank(target_rank=2, warmup=0.1, settle=0.3, every=2)


def start(layer=Triplets, config=CONFIG, steps=STEPS, rank=4, seed=7):
    torch.manual_seed(seed)
    model = small_model(rank, layer)
    optimizer = torch.optim.AdamW(trained(model), lr=0.03)
    return model, optimizer, adapt_ranks(optimizer, model, steps, config)


def checkpoint(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("layer", [Triplets, Products])
@pytest.mark.parametrize("killed", [2, 9, 15, 21, 27])  # before, during and after the fall, and at its end
@pytest.mark.parametrize("shrink_every", [None, 3])
def test_the_continuation_is_bit_identical(layer, killed, shrink_every):
    config = AdaptiveRank(target_rank=2, warmup=0.1, settle=0.3, every=2, shrink_every=shrink_every)
    model, optimizer, allocator = start(layer, config)
    train(model, optimizer, range(killed))
    saved = checkpoint(model, optimizer)
    train(model, optimizer, range(killed, STEPS))

    again, fresh, resumed = start(layer, config, seed=99)
    again.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert resumed.step == killed
    train(again, fresh, range(killed, STEPS))
    assert resumed.rank_pattern() == allocator.rank_pattern()
    assert rank_pattern(again) == rank_pattern(model)
    for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(trained(again), trained(model), strict=True):
        for key, value in optimizer.state[b].items():
            assert torch.equal(fresh.state[a][key], value)


def test_the_optimizers_state_may_come_before_the_models():
    model, optimizer, _ = start()
    train(model, optimizer, range(25))
    saved = checkpoint(model, optimizer)
    again, fresh, _ = start(seed=99)
    fresh.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["model"])
    for m, o in ((model, optimizer), (again, fresh)):
        train(m, o, range(25, STEPS))
    assert torch.equal(again[0].lora_A, model[0].lora_A)


def test_an_earlier_checkpoint_loads_into_a_model_that_has_shrunk():
    model, optimizer, allocator = start()
    train(model, optimizer, range(5))
    early = checkpoint(model, optimizer)
    train(model, optimizer, range(5, STEPS))
    final = model[0].lora_A.detach().clone()
    model.load_state_dict(early["model"])
    optimizer.load_state_dict(early["optimizer"])
    assert model[0].lora_A.shape == (4, 6)
    train(model, optimizer, range(5, STEPS))
    assert torch.equal(model[0].lora_A, final)
    assert allocator.finished


def test_weights_of_another_layer_size_are_refused_by_torch_as_ever():
    model, optimizer, _ = start()
    saved = checkpoint(model, optimizer)["model"]
    saved["0.lora_A"] = torch.ones(4, 7)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.lora_A"):
        model.load_state_dict(saved)


def test_states_that_do_not_belong_are_refused():
    model, optimizer, allocator = start()
    train(model, optimizer, range(25))
    saved = checkpoint(model, optimizer)
    _, other, _ = start(steps=40)
    with pytest.raises(LowrankError, match="saved in a run of 30 steps, but this run has 40; resume with the same"):
        other.load_state_dict(saved["optimizer"])
    state = {**allocator.state_dict(), "layers": ["encoder.q"]}
    with pytest.raises(LowrankError, match=r"was saved for the layers encoder.q, but the model adapts 0, 2; adapt the"):
        allocator.load_state_dict(state)
    _, wider, _ = start(rank=6)
    with pytest.raises(
        LowrankError, match=r"0 has rank 6, but its saved allocation has . of 4; load the model's weights"
    ):
        wider.load_state_dict(saved["optimizer"])
    without = {key: value for key, value in saved["optimizer"].items() if key != "rank_allocator"}
    with pytest.raises(LowrankError, match="this optimizer's state was saved without a rank allocator; to start a new"):
        optimizer.load_state_dict(without)


def test_weights_of_another_rank_without_the_optimizers_state_are_noticed_before_the_step():
    model, optimizer, _ = start()
    train(model, optimizer, range(25))
    shrunk = {name: value.clone() for name, value in model.state_dict().items()}
    fresh_model, fresh, _ = start()
    fresh_model.load_state_dict(shrunk)
    with pytest.raises(
        LowrankError, match=r"has rank ., but the rank allocator left it 4; after loading other weights"
    ):
        train(fresh_model, fresh, range(1))


def test_a_model_built_anew_takes_the_ranks_of_a_checkpoint_before_it_has_an_optimizer():
    model, optimizer, allocator = start()
    train(model, optimizer, range(25))
    saved = checkpoint(model, optimizer)
    torch.manual_seed(99)
    again = small_model(4)
    fit_ranks(again, saved["model"])
    again.load_state_dict(saved["model"])
    fresh = torch.optim.AdamW(trained(again), lr=0.03)
    resumed = adapt_ranks(fresh, again, STEPS, CONFIG)
    fresh.load_state_dict(saved["optimizer"])
    assert resumed.rank_pattern() == allocator.rank_pattern()
    for m, o in ((model, optimizer), (again, fresh)):
        train(m, o, range(25, STEPS))
    assert torch.equal(again[0].lora_A, model[0].lora_A)


def test_a_shrunk_factorized_layer_loads_into_a_fresh_one():
    def layers():
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 8))
        factorize(model, "svd", rank=4)
        return model

    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    adapt_ranks(optimizer, model, 10, AdaptiveRank(target_rank=2, warmup=0, settle=0.2))
    x = torch.randn(4, 2, 4, 4)
    for _ in range(10):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    fresh = layers()
    fit_ranks(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert fresh[0].weight.rank + fresh[2].weight.rank == 4
    assert torch.equal(fresh(x), model(x))
