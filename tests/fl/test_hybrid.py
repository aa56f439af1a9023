"""Pufferfish's hybrid network: first layers whole, the others low-rank, cut off a run whose layers were all whole."""

import pytest
import torch
from safetensors.torch import load_file
from test_run import Watcher

from lowrank_core import LowrankError
from lowrank_fl.clients import examples_of, model_of
from lowrank_fl.config import ModelConfig
from lowrank_fl.load import load_config
from lowrank_fl.models.build import build_model
from lowrank_fl.paper.match import essence
from lowrank_fl.run import run

SMALL = ["rounds=1", "federation.clients=4", "federation.clients_per_round=2", "federation.epochs=1", "model.width=8"]
SMALL += ["data.max_examples=120", "data.max_test_examples=40", "partition.kind=iid", "engine.workers=1"]


def config(*more: str):
    return load_config("quickstart", [*SMALL, "sweep={}", *more])


@pytest.mark.parametrize("method", ["svd", "lowrank", "fedpara"])
@pytest.mark.parametrize("network", ["vgg16", "resnet18", "cnn"])
def test_the_first_layers_stay_whole_and_the_others_are_as_without(network, method):
    def factorized(hybrid: int) -> list[tuple[str, int]]:
        options = ModelConfig.model_validate({"name": network, "method": method, "hybrid": hybrid})
        with torch.device("meta"):
            _, report = build_model(options, (3, 32, 32), 10, seed=0)
        assert report is not None
        return [(entry.name, entry.rank) for entry in report.changed]

    everything = factorized(0)
    # Of ResNet18 conv1 is first, which stays whole where its factors at gamma 1 would be no smaller.
    first = 1 if network == "resnet18" and everything[0][0] != "conv1" else 0
    for hybrid in (1, 2 if network == "cnn" else 5):
        if hybrid - first < len(everything):
            assert factorized(hybrid) == everything[hybrid - first :]


@pytest.mark.slow
def test_factors_are_cut_off_the_svd_of_the_run_that_is_started_from(tmp_path):
    run(config("model.method=original"), tmp_path / "warm", Watcher())
    settings = config(
        f"model.start={tmp_path / 'warm'}", "model.method=svd", "model.gamma=null", "model.rank=3", "model.hybrid=1"
    )
    model, report = model_of(settings, examples_of(settings))
    warm = load_file(tmp_path / "warm" / "model.safetensors")
    assert report is not None
    assert [entry.name for entry in report.changed] == ["features.8"]
    assert torch.equal(model.get_submodule("features.4").weight, warm["features.4.weight"])
    weight = model.get_submodule("features.8").weight
    whole = warm["features.8.weight"].flatten(1).double()
    # Eckart and Young: what is left is as long as the singular values that were cut off.
    left = torch.linalg.matrix_norm(weight().flatten(1).double() - whole)
    assert left.item() == pytest.approx(torch.linalg.svdvals(whole)[3:].norm().item(), rel=1e-5)
    assert torch.equal(weight.values, torch.ones(3))
    torch.testing.assert_close(weight.left.norm(dim=0), weight.right.norm(dim=1))
    assert run(settings, tmp_path / "hybrid", Watcher())[0].rounds == 1


def test_more_layers_than_there_are_leave_nothing_to_factorize():
    with pytest.raises(LowrankError) as caught:
        model_of(config("model.method=fedpara", "model.hybrid=2"), examples_of(config()))
    assert str(caught.value) == (
        "model.hybrid is 2, and cnn has 2 layers that would become factors; keep fewer of them whole, or set "
        "model.method=original"
    )


def test_a_hybrid_is_another_experiment_but_for_the_original():
    assert essence(config("model.method=svd", "model.hybrid=1")) != essence(config("model.method=svd"))
    assert essence(config("model.method=original", "model.hybrid=1")) == essence(config("model.method=original"))
