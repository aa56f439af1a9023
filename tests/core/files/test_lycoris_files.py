"""LyCORIS: its files load here and ours there, with equal outputs; and its known faults, so that we see them mended."""

import copy
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_core
from lowrank_core import LoHa, LoKr, LoRA
from lowrank_core.files import read

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lycoris
    from lycoris.modules.loha import LohaModule

logging.getLogger("LyCORIS").setLevel(logging.ERROR)

TARGETS = ["conv_in", "pointwise", "to_q", "to_out.0", "head"]
ALGORITHMS = {
    "locon": {"algo": "locon"},
    "locon-tucker": {"algo": "locon", "use_tucker": True},
    "locon-dora": {"algo": "locon", "dora_wd": True},
    "locon-dora-in": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "loha-scalar": {"algo": "loha", "use_scalar": True},
    "loha-dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1},
    "lokr-whole": {"algo": "lokr", "full_matrix": True},
    "lokr-both": {"algo": "lokr", "decompose_both": True, "linear_dim": 1, "conv_dim": 1, "use_tucker": True},
    "lokr-scalar": {"algo": "lokr", "use_scalar": True, "factor": 2},
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomised(network):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            else:
                parameter.normal_(std=0.4)
    return network.eval()


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_what_lycoris_writes_loads_here_with_equal_outputs(net, images, tmp_path, kind):
    arguments = {"linear_dim": 4, "conv_dim": 3, **ALGORITHMS[kind]}
    dim = arguments.pop("linear_dim")
    theirs = copy.deepcopy(net)
    network = lycoris.create_lycoris(theirs, 1.0, linear_dim=dim, linear_alpha=2, conv_alpha=1.5, **arguments)
    network.apply_to()
    randomised(network)
    expected = theirs(images)
    assert not torch.allclose(expected, net(images), atol=1e-2)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "a.safetensors")
    ours = lowrank_core.load(copy.deepcopy(net), tmp_path / "a.safetensors").eval()
    torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decompose_both", [False, True])
def test_a_lokr_whose_factor_lycoris_swaps_loads_and_goes_on(tmp_path, decompose_both):
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 320))
    theirs = copy.deepcopy(net)
    network = lycoris.create_lycoris(theirs, 1.0, 4, algo="lokr", factor=16, decompose_both=decompose_both)
    network.apply_to()
    randomised(network)
    x = torch.randn(3, 64)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "a.safetensors")
    ours = lowrank_core.load(copy.deepcopy(net), tmp_path / "a.safetensors").eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    lowrank_core.save(ours, tmp_path / "b.safetensors", "kohya")
    lowrank_core.save(ours, tmp_path / "lora", "lora")
    for path in (tmp_path / "b.safetensors", tmp_path / "lora"):
        again = lowrank_core.load(copy.deepcopy(net), path).eval()
        torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=1e-3)
    ours.train()(x).square().sum().backward()
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    lowrank_core.merge(ours)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-3)


OURS = {
    "lora": LoRA(rank=4, alpha=2, target_modules=TARGETS, rank_pattern={"to_q": 3}, alpha_pattern={"head": 5}),
    "rslora": LoRA(rank=4, alpha=2, target_modules=TARGETS, rank_stabilized=True),
    "lora-tucker": LoRA(rank=4, alpha=2, target_modules=TARGETS, tucker=True),
    "dora": LoRA(rank=4, alpha=2, target_modules=TARGETS, weight_decompose="out"),
    "loha": LoHa(rank=3, alpha=2, target_modules=TARGETS, alpha_pattern={"head": 5}),
    "loha-tucker": LoHa(rank=3, alpha=2, target_modules=TARGETS, tucker=True),
    "doha": LoHa(rank=3, alpha=2, target_modules=TARGETS, weight_decompose="out"),
    "lokr": LoKr(rank=1, alpha=3, target_modules=TARGETS),
    "lokr-whole": LoKr(rank=16, alpha=8, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", OURS)
def test_what_we_write_loads_in_lycoris_and_here_with_equal_outputs(net, adapted, images, tmp_path, kind):
    model = adapted(OURS[kind]).eval()
    lowrank_core.save(model, tmp_path / "a.safetensors", "kohya")
    again = lowrank_core.load(copy.deepcopy(net), tmp_path / "a.safetensors").eval()
    torch.testing.assert_close(again(images), model(images))
    theirs = copy.deepcopy(net)
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), theirs)
    assert len(network.loras) == len(lowrank_core.adapters_of(model))
    network.apply_to()
    network.eval()
    torch.testing.assert_close(theirs(images), model(images), rtol=1e-5, atol=1e-6)


def test_a_rank_stabilised_module_has_its_scale_in_alpha(net, images, tmp_path):
    module = randomised(LohaModule("lycoris_head", net.head, lora_dim=4, alpha=2, rs_lora=True))
    save_file(
        {f"lycoris_head.{key}": t.contiguous() for key, t in module.state_dict().items()}, tmp_path / "a.safetensors"
    )
    (file,) = read(tmp_path / "a.safetensors", {"": ["head"]})
    assert file.scaling("head") == pytest.approx(2 / 4**0.5)


def test_an_old_file_with_a_scalar_apart_or_one_core_for_both_sides(net, adapted, images, tmp_path):
    model = adapted(OURS["loha-tucker"]).eval()
    with torch.no_grad():
        for adapter in lowrank_core.adapters_of(model).values():
            if "hada_t2" in adapter.factor_names:
                adapter.hada_t2.copy_(adapter.hada_t1)
    lowrank_core.save(model, tmp_path / "new.safetensors", "kohya")
    tensors = load_file(tmp_path / "new.safetensors")
    for key in list(tensors):
        if key.endswith("hada_t2"):
            del tensors[key]
        if key.endswith("hada_w1_a"):
            tensors[key.replace("hada_w1_a", "scalar")] = torch.tensor(0.5)
            tensors[key] = tensors[key] * 2
    save_file(tensors, tmp_path / "old.safetensors")
    old = lowrank_core.load(copy.deepcopy(net), tmp_path / "old.safetensors").eval()
    torch.testing.assert_close(old(images), model(images))


def test_lycoris_still_scales_twice_when_it_merges():
    """If this fails, LyCORIS has mended it: say so in the documentation."""
    layer = torch.nn.Linear(6, 5, bias=False)
    module = randomised(LohaModule("lycoris_layer", layer, lora_dim=8, alpha=1))
    forward = module.get_weight(None)
    merged, _ = module.get_diff_weight()
    torch.testing.assert_close(merged, forward / 8)
