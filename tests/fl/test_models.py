"""The benchmark networks against the paper's numbers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank_core import FactorizedConv2d, FactorizedLinear, FactorizedLSTM, LowrankError
from lowrank_fl.config import ModelConfig
from lowrank_fl.models.build import build_model
from lowrank_fl.state import transferred

# Table 5 of the paper, millions of VGG16's parameters at gamma 0.1 to 0.9.
TABLE_5 = {
    10: [15.25, 1.55, 2.33, 3.31, 4.45, 5.79, 7.33, 9.01, 10.90, 12.92],
    100: [15.30, 1.59, 2.38, 3.36, 4.50, 5.84, 7.38, 9.05, 10.94, 12.96],
}


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build(name: str, shape: tuple[int, ...], classes: int, **options: object):
    return build_model(ModelConfig.model_validate({"name": name, **options}), shape, classes, seed=0)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("tenths", range(10))
def test_vgg16_has_the_sizes_of_table_5_within_one_unit(classes, tenths):
    with torch.device("meta"):
        method = {"method": "fedpara", "gamma": tenths / 10} if tenths else {"method": "original"}
        model, _ = build("vgg16", (3, 32, 32), classes, **method)
    off_by = round(100 * (round(params(model) / 1e6, 2) - TABLE_5[classes][tenths]))
    assert abs(off_by) <= 1 if tenths else off_by == 0


def test_table_5_is_the_one_in_the_reference_file(shared_data: Path):
    tables = json.loads((shared_data.parent / "reference" / "fedpara_tables.json").read_text())
    for classes, row in TABLE_5.items():
        assert list(tables["table5_vgg16_params_millions"][f"classes_{classes}"].values()) == row


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_low_rank_vgg16_costs_what_fedpara_costs(gamma):
    with torch.device("meta"):
        fedpara, lowrank = (
            build("vgg16", (3, 32, 32), 10, method=method, gamma=gamma)[0] for method in ("fedpara", "lowrank")
        )
    assert params(lowrank) == pytest.approx(params(fedpara), rel=0.005)


@pytest.mark.slow
def test_vgg16_factorizes_its_13_convolutions_and_not_its_head():
    model, report = build("vgg16", (3, 32, 32), 10, gamma=0.1, tanh=True)
    assert report is not None
    assert sum(isinstance(m, FactorizedConv2d) for m in model.modules()) == len(report.changed) == 13
    assert [e.name for e in report.left] == ["classifier.1", "classifier.4", "classifier.6"]
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_papers_mlp_has_its_numbers():
    assert params(build("mlp", (1, 28, 28), 62, width=256, method="original")[0]) == 216_894
    model, _ = build("mlp", (1, 28, 28), 62, width=256, method="pfedpara", gamma=0.5)
    assert isinstance(model.fc1, FactorizedLinear)
    shared = {n: t for n, t in transferred(model).items() if not n.endswith(("x2", "y2"))}
    assert sum(tensor.numel() for tensor in shared.values()) == 63_646


def test_the_lstm_at_gamma_0_is_a_fifth_of_the_original_as_in_table_11():
    original, _ = build("lstm", (80,), 80, method="original")
    model, report = build("lstm", (80,), 80, method="fedpara", gamma=0.0)
    assert isinstance(model.lstm, FactorizedLSTM)
    assert round(params(model) / params(original), 2) == 0.19
    assert report is not None
    assert {e.rank for e in report.changed} == {3, 16}
    assert model(torch.randint(0, 80, (2, 80))).shape == (2, 80)
    assert any(name.endswith("norm_hh_l1") for name in transferred(model))


@pytest.mark.slow
def test_resnet18_keeps_the_size_of_the_papers_exceptions():
    model, report = build("resnet18", (3, 32, 32), 10, gamma=0.1)
    assert report is not None
    by_name = {e.name: e for e in report.changed}
    for name in ("conv1", "layer1.0.conv1", "layer2.0.downsample.0"):
        assert by_name[name].params > 0.8 * by_name[name].original_params
    assert by_name["layer4.1.conv2"].params < 0.12 * by_name["layer4.1.conv2"].original_params
    assert isinstance(model.bn1, nn.BatchNorm2d)
    assert "bn1.running_mean" in transferred(model)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert build("resnet18", (1, 96, 96), 5, method="original")[0](torch.randn(2, 1, 96, 96)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 20, 44)], ids=str)
def test_the_small_cnn_reads_pictures_from_8_pixels(shape):
    model, report = build("cnn", shape, 7, method="fedpara")
    assert report is not None
    assert [e.name for e in report.changed] == ["features.4", "features.8"]
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    "rule", [{"gamma": 0.3}, {"ratio": 0.3}, {"rank": 4}, {"budget": 40_000}, {"budget": "160KB"}], ids=str
)
def test_every_rank_rule_reaches_the_model(rule):
    model, _ = build("cnn", (3, 32, 32), 10, **rule)
    assert params(model) < params(build("cnn", (3, 32, 32), 10, method="original")[0])
    if "budget" in rule:
        assert params(model) <= 40_000


def test_the_same_seed_builds_the_same_bits_and_leaves_torchs_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, _ = build("cnn", (1, 8, 8), 10)
    assert torch.equal(torch.rand(1), expected)
    second, _ = build("cnn", (1, 8, 8), 10)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lstm", (1, 8, 8), "model 'lstm' does not read pictures; lstm reads text"),
        ("cnn", (80,), "model 'cnn' does not read text; use model.name=lstm"),
        ("cnn", (1, 7, 9), "model 'cnn' reads pictures of at least 8x8 pixels, these have 7x9"),
        ("vgg16", (1, 28, 28), "model 'vgg16' reads 32x32 pixels, the pictures have 28x28; use model.name=cnn"),
        ("resnet18", (1, 8, 8), "model 'resnet18' reads pictures of at least 16x16 pixels, these have 8x8"),
    ],
)
def test_inputs_that_a_model_does_not_read_are_refused(name, shape, message):
    with pytest.raises(LowrankError, match=message):
        build(name, shape, 10, method="original")
