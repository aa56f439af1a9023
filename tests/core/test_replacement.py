"""`factorize` on whole models: what it changes, what it leaves and why, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from lowrank_core import FactorizedConv2d, FactorizedLinear, FactorizedLSTM, Gamma, LowrankError, UsageError, factorize


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(32, 40),
        nn.Linear(40, 2),
    )


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara", "svd", "kronecker"])
def test_every_layer_whose_factors_are_smaller_is_replaced(method):
    model = small_model()
    x = torch.randn(2, 8, 5, 5)
    before = model(x)
    report = factorize(model, method, gamma=0.0)
    assert isinstance(model[0], FactorizedConv2d)
    assert isinstance(model[2], FactorizedConv2d)
    assert isinstance(model[4], FactorizedLinear)
    assert [entry.name for entry in report.changed] == ["0", "2", "4"]
    assert model(x).shape == before.shape
    assert report.params == sum(p.numel() for p in model.parameters()) < report.original_params
    assert all(math.prod(e.shape) == e.original_params > e.params for e in report.changed)


def test_a_layer_whose_factors_would_be_larger_stays_and_is_named():
    model = small_model()
    report = factorize(model, "fedpara", rank=2)
    assert isinstance(model[5], nn.Linear)
    assert report.left[0].name == "5"
    assert report.left[0].reason == "rank 2 factors would hold 168 numbers, the weight holds 80"
    assert "5: left, rank 2 factors would hold 168 numbers" in str(report)
    assert "0: 16x8x3x3, rank 2 (reaches 4), 1,152 -> 168" in str(report)


def test_patterns_choose_layers_by_name_and_by_what_contains_them():
    model = nn.Sequential()
    model.add_module("body", small_model())
    model.add_module("head", nn.Sequential(nn.Linear(2, 50), nn.Linear(50, 50)))
    report = factorize(model, "fedpara", rank=1, include=["body", "head.1"], exclude=["*.2"])
    assert {entry.name for entry in report.changed} == {"body.0", "body.4", "head.1"}
    assert {entry.name: entry.reason for entry in report.left}["body.2"] == "excluded"
    assert {entry.name: entry.reason for entry in report.left}["head.0"] == "not included"


def test_exceptions_follow_their_own_rule():
    model = small_model()
    report = factorize(model, "fedpara", gamma=0.0, exceptions={"0": Gamma(1.0)})
    by_name = {entry.name: entry for entry in report.changed}
    assert by_name["0"].rank == Gamma(1.0)((16, 8, 3, 3)) > Gamma(0.0)((16, 8, 3, 3))
    assert by_name["4"].rank == Gamma(0.0)((40, 32))


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "svd", "kronecker"])
@pytest.mark.parametrize("budget", [2000, 2500, 5000, 10**9, "20KB"])
def test_a_budget_is_kept_and_not_wasted(method, budget):
    report = factorize(small_model(), method, budget=budget)
    limit = budget if isinstance(budget, int) else 5000
    assert report.params <= limit
    more = factorize(small_model(), method, gamma=1.0).params
    assert report.params > 0.7 * min(limit, more)


def test_a_module_used_under_two_names_is_replaced_under_both():
    shared = nn.Linear(30, 30)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = factorize(model, "fedpara", rank=2)
    assert model[0] is model[2]
    assert isinstance(model[0], FactorizedLinear)
    assert report.params == sum(p.numel() for p in model.parameters())


def test_a_weight_tied_to_another_module_stays():
    embedding, decoder = nn.Embedding(50, 30), nn.Linear(30, 50)
    decoder.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(30, 30), decoder)
    report = factorize(model, "fedpara", rank=2)
    assert [(e.name, e.reason) for e in report.left] == [("2", "the weight is shared with another module")]


def test_options_that_factors_do_not_cover_are_left_and_named():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding_mode="circular"), nn.LSTM(8, 8, proj_size=4), nn.Linear(20, 20))
    reasons = {entry.name: entry.reason for entry in factorize(model, "fedpara", rank=1).left}
    assert reasons == {"0": "padding_mode 'circular' is not covered", "1": "a projected LSTM is not covered"}


def test_each_matrix_of_an_lstm_gets_its_own_rank():
    model = nn.Sequential(nn.LSTM(8, 64, 2))
    report = factorize(model, "fedpara", gamma=0.0)
    assert isinstance(model[0], FactorizedLSTM)
    assert [(e.name, e.rank) for e in report.changed] == [
        ("0.weight_ih_l0", 3),
        ("0.weight_hh_l0", 8),
        ("0.weight_ih_l1", 8),
        ("0.weight_hh_l1", 8),
    ]


def test_biases_dtype_device_and_mode_are_kept():
    model = nn.Sequential(nn.Linear(20, 20, dtype=torch.float64)).eval()
    bias = model[0].bias
    factorize(model, "fedpara", rank=2)
    assert model[0].bias is bias
    assert model[0].weight.x1.dtype == torch.float64
    assert not model[0].training
    with torch.device("meta"):
        on_meta = nn.Sequential(nn.Linear(20, 20))
    factorize(on_meta, "fedpara", rank=2)
    assert on_meta[0].weight.x1.is_meta


def test_the_same_seed_draws_the_same_factors_and_init_is_by_name():
    models = []
    for init in ("calibrated", "calibrated", "paper", "flower"):
        torch.manual_seed(3)
        model = small_model()
        factorize(model, "fedpara", gamma=0.5, init=init)
        models.append(model[4].weight.x1)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
    assert not torch.equal(models[2], models[3])


def test_factors_train_and_their_state_loads_into_a_fresh_model():
    model = small_model()
    factorize(model, "pfedpara", gamma=0.3)
    x = torch.randn(2, 8, 5, 5)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    fresh = small_model()
    factorize(fresh, "pfedpara", gamma=0.3)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, UsageError, "rank must be at least 1, got 0"),
        ({"gamma": 1.5}, UsageError, "gamma must lie between 0 and 1, got 1.5"),
        ({}, UsageError, "exactly one of gamma, ratio, rank and budget, got none"),
        ({"gamma": 0.1, "rank": 3}, UsageError, "exactly one of gamma, ratio, rank and budget, got gamma and rank"),
        (
            {"rank": 1, "method": "lora"},
            UsageError,
            "method must be one of .*, svd, kronecker, got 'lora'",
        ),
        ({"rank": 1, "method": "lowrank", "tanh": True}, UsageError, "tanh is a form of fedpara alone"),
        (
            {"rank": 1, "method": "svd", "init": "flower"},
            UsageError,
            "init 'flower' says how FedPara's factors",
        ),
        ({"rank": 1, "include": ["44"]}, UsageError, 'no layer matches "44"; nearest: "4"'),
        ({"rank": 1, "exceptions": {"x": Gamma(1)}}, UsageError, 'no layer matches "x"; nearest: "0", "2", "4"'),
        ({"budget": 10}, LowrankError, "a budget of 10 parameters is below the smallest size"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused_and_the_model_is_unchanged(options, error, message):
    model = small_model()
    with pytest.raises(error, match=message):
        factorize(model, **options)
    assert not any(isinstance(m, FactorizedConv2d | FactorizedLinear) for m in model.modules())


def test_models_without_a_layer_to_replace_are_refused():
    with pytest.raises(LowrankError, match="no Linear, Conv2d or LSTM to factorize in this model"):
        factorize(nn.Sequential(nn.ReLU()), rank=1)
    with pytest.raises(LowrankError, match="a bare Linear cannot be replaced in place"):
        factorize(nn.Linear(4, 4), rank=1)
