"""Ranks of real adapters, ours and PEFT's: found without a word of configuration, exact after shrinking, and saved."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank_core.adapters.config import AdaLoRA, LoHa
from lowrank_core.adapters.control import adapters_of
from lowrank_core.adapters.inject import inject
from lowrank_core.adapters.tensors import load_state_dict_into, state_dict_of
from lowrank_core.adaptive import AdaptiveRank, adapt_ranks, fit_ranks, rank_pattern
from lowrank_core.files import load, save
from lowrank_core.replacement import factorize

pytestmark = pytest.mark.usefixtures("on_device")

STEPS = 20


class Net(nn.Module):
    """A strided convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2)
        self.hidden = nn.Linear(54, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(torch.relu(self.conv(x)).flatten(1))))


def run(model: nn.Module, config: AdaptiveRank | None = None):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    allocator = adapt_ranks(optimizer, model, STEPS, config)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 8, 8, generator=generator, device="cpu").to(torch.get_default_device())
        loss = (model(x) - x.mean((1, 2, 3))[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return allocator


def test_injected_adapters_bring_their_own_configuration_and_keep_their_scale():
    config = AdaLoRA(rank=4, alpha=6, target_rank=2, settle=0.3, orthogonality=0.2, target_modules="all-linear")
    model = inject(nn.Sequential(Net()), AdaLoRA(**{**vars(config), "target_modules": ["conv", "hidden", "out"]}))
    allocator = run(model)
    assert allocator.config == AdaptiveRank.of(config)
    assert sum(allocator.ranks().values()) == 6
    patterns = rank_pattern(model)
    assert len(patterns) == 3
    for name, adapter in adapters_of(model).items():
        rank = sum(adapter.rank_pattern)
        assert adapter.scaling == pytest.approx(6 / (4 + 1e-5))
        assert adapter.rank == len(adapter.rank_pattern) == 4
        assert adapter.lora_A.shape[0] == adapter.lora_E.shape[0] == adapter.lora_B.shape[1] == rank
        assert any(key.startswith(f"{name}.") or f".{name}." in key for key in patterns)


def test_a_shrunk_adapter_gives_the_outputs_of_the_masked_one():
    torch.manual_seed(1)
    wide = inject(Net(), AdaLoRA(rank=4, target_rank=1, orthogonality=0, target_modules=["conv", "hidden"]))
    small = copy.deepcopy(wide)
    quiet = {"target_rank": 1, "settle": 0.2, "orthogonality": 0}
    run(wide, AdaptiveRank(**quiet, shrink=False))
    run(small, AdaptiveRank(**quiet))
    x = torch.randn(3, 2, 8, 8)
    assert adapters_of(small)["conv"].lora_E.numel() < 4 or adapters_of(small)["hidden"].lora_E.numel() < 4
    torch.testing.assert_close(small(x), wide(x), rtol=1e-4, atol=1e-5)


def test_an_injected_loha_keeps_equal_ranks_on_both_sides():
    model = inject(Net(), LoHa(rank=4, target_modules=["conv", "hidden", "out"]))
    allocator = run(model, AdaptiveRank(target_rank=2, settle=0.3))
    assert sum(allocator.ranks().values()) == 6
    for adapter in adapters_of(model).values():
        ranks = {
            adapter.hada_w1_a.shape[1],
            adapter.hada_w1_b.shape[0],
            adapter.hada_w2_a.shape[1],
            adapter.hada_w2_b.shape[0],
        }
        assert ranks == {sum(adapter.rank_pattern)}


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT's, where a layer's rank fell to 0,
@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match")  # and whenever it loads an AdaLoRA of its own
def test_pefts_adalora_shrinks_saves_and_loads_in_peft(tmp_path):
    torch.manual_seed(2)
    base = Net()
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=6,
        total_step=STEPS,
        lora_alpha=5,
        target_modules=["conv", "hidden", "out"],
    )
    model = get_peft_model(copy.deepcopy(base), config)
    allocator = run(model)
    assert allocator.schedule.begin == 2
    assert allocator.schedule.end == 14
    assert allocator.config.orthogonality == 0.5
    shapes = [p.shape for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(shape[0] for shape in shapes) == 6
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert [p.shape for n, p in again.named_parameters() if "lora_E" in n] == shapes
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def test_pefts_adalora_that_adds_the_penalty_itself_gets_it_once():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=STEPS, target_modules=["out"], tinit=2, tfinal=2)
    model = get_peft_model(Net(), config)
    model.peft_config["default"].task_type = "SEQ_CLS"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert adapt_ranks(optimizer, model, STEPS).config.orthogonality == 0


def test_pefts_loha_adapts_too():
    model = get_peft_model(Net(), LoHaConfig(r=4, target_modules=["conv", "hidden", "out"]))
    allocator = run(model, AdaptiveRank(target_rank=2, settle=0.3))
    assert sum(allocator.ranks().values()) == 6
    assert set(allocator.ranks()) == {f"base_model.model.{name}.default" for name in ("conv", "hidden", "out")}


def test_svd_layers_adapt_while_they_train_from_scratch():
    model = Net()
    factorize(model, "svd", rank=3, include=["conv", "hidden"])
    allocator = run(model, AdaptiveRank(target_rank=1, settle=0.3, orthogonality=0.1))
    ranks = allocator.ranks()
    assert sum(ranks.values()) == 2
    for name, rank in ranks.items():
        weight = model.get_submodule(name)
        assert weight.left.shape[1] == weight.values.shape[0] == weight.right.shape[0] == weight.rank == rank
    assert model(torch.randn(3, 2, 8, 8)).shape == (3, 3)


def scaled_outputs(folder_or_file, base, x):
    return load(copy.deepcopy(base), folder_or_file).eval()(x)


@pytest.mark.parametrize("stabilized", [False, True])
def test_a_shrunk_loha_is_saved_with_the_ranks_and_the_scale_it_has(tmp_path, stabilized):
    torch.manual_seed(3)
    base = Net()
    config = LoHa(rank=6, alpha=5, target_modules=["conv", "hidden", "out"], rank_stabilized=stabilized)
    model = inject(copy.deepcopy(base), config)
    allocator = run(model, AdaptiveRank(target_rank=3, settle=0.3))
    assert len(set(allocator.ranks().values())) > 1
    x = torch.randn(3, 2, 8, 8)
    expected = model.eval()(x)
    save(model, tmp_path / "peft")
    save(model, tmp_path / "k.safetensors", "kohya")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(x), expected)
    for path in (tmp_path / "peft", tmp_path / "k.safetensors"):
        torch.testing.assert_close(scaled_outputs(path, base, x), expected)
    held = load_file(tmp_path / "k.safetensors")
    for name, adapter in adapters_of(model).items():
        rank = held[f"lycoris_{name}.hada_w1_b"].shape[0]
        assert float(held[f"lycoris_{name}.alpha"]) / rank == pytest.approx(adapter.scaling, rel=1e-6)
    fresh = inject(copy.deepcopy(base), config)
    load_state_dict_into(fresh, state_dict_of(model))
    torch.testing.assert_close(fresh.eval()(x), expected)


def test_pefts_shrunk_loha_saves_and_loads_in_peft(tmp_path):
    torch.manual_seed(4)
    base = Net()
    config = LoHaConfig(r=6, alpha=5, target_modules=["conv", "hidden", "out"], rank_pattern={"out": 4})
    model = get_peft_model(copy.deepcopy(base), config)
    ranks = run(model, AdaptiveRank(target_rank=2, settle=0.3)).ranks()
    assert sum(ranks.values()) == 6
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 2, 8, 8)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))
    torch.testing.assert_close(scaled_outputs(tmp_path, base, x), model(x))
    anew = get_peft_model(copy.deepcopy(base), LoHaConfig(r=6, alpha=5, target_modules=["conv", "hidden", "out"]))
    fit_ranks(anew, model.state_dict())
    assert anew.peft_config["default"].rank_pattern == {
        f"^{name.removeprefix('base_model.model.').removesuffix('.default')}": rank
        for name, rank in ranks.items()
        if rank != 6
    }
