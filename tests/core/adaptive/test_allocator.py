"""A whole run under plain loops: the authors' masks, the budget, and what optimizers and scalers do."""

import copy

import pytest
import torch
from adaptive_models import Products, Triplets, batch, loss_of, small_model, train, trained
from torch import nn

from lowrank_core.adaptive import AdaptiveRank, adapt_ranks, rank_pattern
from lowrank_core.adaptive.orthogonality import orthogonality
from lowrank_core.errors import LowrankError, UsageError

pytestmark = pytest.mark.usefixtures("on_device")

QUICK = AdaptiveRank(target_rank=2, warmup=0.1, settle=0.3, orthogonality=0.1)


def adapted(config=QUICK, steps=20, optimizer=torch.optim.Adam, layer=Triplets, **options):
    torch.manual_seed(3)
    model = small_model(layer=layer)
    optimizer = optimizer(trained(model), lr=0.05, **options)
    return model, optimizer, adapt_ranks(optimizer, model, steps, config)


@pytest.mark.parametrize("every", [1, 3])
def test_values_follow_pefts_allocator_step_by_step(every):
    from peft import AdaLoraConfig, get_peft_model

    steps, begin, settle, wide = 24, 3, 7, torch.float64
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=begin, tfinal=settle, deltaT=every, total_step=steps, target_modules=["0", "2"]
    )
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    theirs = get_peft_model(base, config).double()
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.AdamW(trained(model), lr=0.02) for model in (theirs, ours)]
    allocator = adapt_ranks(
        optimizers[1],
        ours,
        steps,
        AdaptiveRank(
            target_rank=2, warmup=begin / steps, settle=settle / steps, every=every, orthogonality=0, shrink=False
        ),
    )
    for step in range(1, steps + 1):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step, wide).backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name, s=step: f"{n} at {s}: {m}")
    pattern = theirs.peft_config["default"].rank_pattern
    assert ours.peft_config["default"].rank_pattern == pattern
    assert {f"base_model.model.{k.replace('.lora_E', '')}": v for k, v in pattern.items()} == allocator.rank_pattern()


@pytest.mark.parametrize("layer", [Triplets, Products])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_a_run_ends_at_the_budget_with_smaller_parameters_and_states(layer, optimizer):
    model, optimizer, allocator = adapted(layer=layer, optimizer=optimizer)
    before = sum(p.numel() for p in trained(model))
    same = trained(model)
    train(model, optimizer, range(20))
    ranks = allocator.ranks()
    assert sum(ranks.values()) == 4
    assert allocator.finished
    assert sum(p.numel() for p in trained(model)) < before
    assert all(a is b for a, b in zip(same, trained(model), strict=True))
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert all(rank in p.shape for p in trained(layer))
        assert sum(layer.rank_pattern) == rank
        assert len(layer.rank_pattern) == 4
    assert rank_pattern(model) == allocator.rank_pattern()
    for parameter in trained(model):
        for value in optimizer.state[parameter].values():
            assert value is None or value.ndim == 0 or value.shape == parameter.shape


def test_the_budget_is_met_at_every_allocation():
    model, optimizer, allocator = adapted(AdaptiveRank(target_rank=1, warmup=0.1, settle=0.1, shrink=False), 60)
    for step in range(1, 61):
        train(model, optimizer, range(step, step + 1))
        if step > allocator.schedule.begin:
            values = [(layer.lora_E.detach() != 0).flatten().tolist() for layer in (model[0], model[2])]
            assert values == list(allocator.rank_pattern().values())
            assert sum(map(sum, values)) == allocator.schedule.budget(step)


def test_a_pruned_direction_that_comes_to_matter_revives_unless_it_was_removed():
    for shrink_every in (None, 1):
        config = AdaptiveRank(target_rank=2, warmup=0.1, settle=0.1, shrink_every=shrink_every)
        model, optimizer, allocator = adapted(config, 60)
        train(model, optimizer, range(20))
        pruned = allocator.rank_pattern()["0"].index(False)
        if shrink_every is None:
            with torch.no_grad():
                model[0].lora_A[pruned] *= 100
        train(model, optimizer, range(20, 25))
        assert allocator.rank_pattern()["0"][pruned] == (shrink_every is None)


def test_a_start_at_the_target_keeps_every_direction():
    model, optimizer, allocator = adapted(AdaptiveRank(target_rank=4))
    train(model, optimizer, range(20))
    assert allocator.ranks() == {"0": 4, "2": 4}
    assert model[0].rank_pattern == [True] * 4


def test_removing_on_the_way_saves_memory_early():
    model, optimizer, allocator = adapted(AdaptiveRank(target_rank=1, warmup=0, settle=0.1, shrink_every=5), 40)
    sizes = []
    for step in range(1, 41):
        train(model, optimizer, range(step, step + 1))
        sizes.append(sum(p.numel() for p in trained(model)))
    assert len(set(sizes)) > 3
    assert sizes == sorted(sizes, reverse=True)
    assert sum(allocator.ranks().values()) == 2


def test_the_step_descends_the_penalty_as_if_it_were_in_the_loss():
    steps = 6  # none of which prunes
    model, optimizer, _ = adapted(AdaptiveRank(target_rank=4, orthogonality=0.7), 20, torch.optim.SGD)
    reference = copy.deepcopy(model)
    plain = torch.optim.SGD(trained(reference), lr=0.05)
    train(model, optimizer, range(steps))
    for step in range(steps):
        oriented = [
            (p, dim) for layer in (reference[0], reference[2]) for p, dim in ((layer.lora_A, 0), (layer.lora_B, 1))
        ]
        plain.zero_grad()
        (loss_of(reference, step) + 0.7 * orthogonality(oriented)).backward()
        plain.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_accumulated_batch_is_one_step():
    whole, halves = adapted(), adapted()
    for step in range(20):
        x, y = batch(step)
        for (model, optimizer, _), parts in ((whole, [slice(None)]), (halves, [slice(0, 8), slice(8, 16)])):
            optimizer.zero_grad()
            for part in parts:
                (nn.functional.mse_loss(model(x[part]), y[part]) / len(parts)).backward()
            optimizer.step()
    assert whole[2].step == halves[2].step == 20
    assert whole[2].rank_pattern() == halves[2].rank_pattern()
    for a, b in zip(trained(whole[0]), trained(halves[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_step_with_a_closure_gets_the_penalty_too():
    plain, closure, keyword = adapted(), adapted(), adapted()
    train(plain[0], plain[1], range(20))
    for step in range(20):
        for (model, optimizer, _), named in ((closure, False), (keyword, True)):

            def evaluate(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            assert (optimizer.step(closure=evaluate) if named else optimizer.step(evaluate)) is not None
    for a, b, c in zip(trained(plain[0]), trained(closure[0]), trained(keyword[0]), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_steps_that_a_gradient_scaler_skips_do_not_count(device):
    model, optimizer, allocator = adapted()
    scaler = torch.amp.GradScaler(device.type, init_scale=16.0)
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert allocator.step == 5


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_no_decision(fused, device):
    plain, scaled = adapted(fused=fused), adapted(fused=fused)
    train(plain[0], plain[1], range(20))
    scaler = torch.amp.GradScaler(device.type, init_scale=16.0)
    model, optimizer, allocator = scaled
    for step in range(20):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert allocator.rank_pattern() == plain[2].rank_pattern()
    for a, b in zip(trained(plain[0]), trained(model), strict=True):
        torch.testing.assert_close(a, b)


def test_a_fused_optimizer_that_skips_inside_its_step_does_not_count_either(device):
    model, optimizer, allocator = adapted(fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=16.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step) * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert allocator.step == 3


def test_layers_that_the_loss_does_not_reach_are_pruned_and_their_factors_stay():
    torch.manual_seed(3)
    model = small_model()
    model.add_module("expert", Triplets(4, 4, 4))
    before = model.expert.lora_A.detach().clone()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    allocator = adapt_ranks(optimizer, model, 20, AdaptiveRank(target_rank=2, warmup=0, settle=0.2, shrink=False))
    for step in range(20):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.mse_loss(model[2](model[1](model[0](x))), y).backward()
        optimizer.step()
    assert allocator.ranks()["expert"] == 0
    assert torch.equal(model.expert.lora_A, before)


def test_a_layer_whose_rank_fell_to_zero_trains_on_as_its_base():
    torch.manual_seed(3)
    model = small_model()
    model.add_module("unused", Triplets(3, 3, 4))
    optimizer = torch.optim.Adafactor(trained(model), lr=0.01)
    adapt_ranks(optimizer, model, 20, AdaptiveRank(target_rank=2, warmup=0, settle=0.4, orthogonality=0))
    for step in range(20):
        optimizer.zero_grad()
        x, y = batch(step)
        (nn.functional.mse_loss(model[2](model[1](model[0](x))), y) + 0 * model.unused(y).sum()).backward()
        optimizer.step()
    assert model.unused.lora_A.shape == (0, 3)
    torch.testing.assert_close(model.unused(y), model.unused.base(y))


def test_after_detaching_ranks_stay_as_they_are():
    model, optimizer, allocator = adapted()
    allocator.detach()
    train(model, optimizer, range(20))
    assert model[0].lora_A.shape == (4, 6)
    assert allocator.step == 0
    assert "rank_allocator" not in optimizer.state_dict()
    adapt_ranks(optimizer, model, 20, QUICK)


def test_what_cannot_be_adapted_is_refused():
    model, optimizer, _ = adapted()
    with pytest.raises(LowrankError, match="this optimizer has a rank allocator already; detach that one first"):
        adapt_ranks(optimizer, model, 20, QUICK)
    with pytest.raises(
        LowrankError, match=r"the optimizer does not train 2\.lora_E; adapt ranks with the one that does"
    ):
        adapt_ranks(torch.optim.SGD(trained(model[0]), lr=1), model, 20, QUICK)
    with pytest.raises(LowrankError, match="this model has no trainable AdaLoRA or LoHa adapter and no svd layer"):
        adapt_ranks(optimizer, nn.Linear(3, 3), 20, QUICK)
    with pytest.raises(UsageError, match=r"ranks adapt in the hooks of a torch.optim.Optimizer, got a object"):
        adapt_ranks(object(), model, 20, QUICK)
    fresh = small_model()
    with pytest.raises(UsageError, match="0 does not say how its rank should fall; give adapt_ranks a config"):
        adapt_ranks(torch.optim.SGD(trained(fresh), lr=1), fresh, 20)
    mixed = nn.Sequential(Triplets(3, 3, 2), Products(3, 3, 2))
    with pytest.raises(LowrankError, match="ranks of several kinds, adalora and loha, whose scores do not compare"):
        adapt_ranks(torch.optim.SGD(trained(mixed), lr=1), mixed, 20, QUICK)
    mixed[0].requires_grad_(False)
    mixed[1].hada_t1 = nn.Parameter(torch.ones(2, 2, 3, 3))
    with pytest.raises(
        LowrankError, match="1 is a LoHa in Tucker form, whose rank cannot be adapted; use flat factors"
    ):
        adapt_ranks(torch.optim.SGD(trained(mixed), lr=1), mixed, 20, QUICK)


def test_an_optimizer_whose_state_cannot_be_cut_is_refused_at_its_first_step():
    model = small_model()
    optimizer = torch.optim.LBFGS(trained(model))
    adapt_ranks(optimizer, model, 20, QUICK)

    def evaluate():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with pytest.raises(
        LowrankError, match=r"the optimizer's al for a parameter of shape .* is list, which does not tell"
    ):
        optimizer.step(evaluate)
