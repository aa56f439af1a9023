"""What makes a run fit on a small card: fewer activations kept."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import lowrank_core
from lowrank_core.adapters.control import adapters_of, trainable_parameters
from lowrank_diffusion.adapting import adapter_config
from lowrank_diffusion.blocks import blocks_of, recompute
from lowrank_diffusion.config import AdapterSettings
from lowrank_diffusion.load import load_config
from lowrank_diffusion.offloading import Offloaded
from lowrank_diffusion.quantizing import QuantizedLinear, quantize

# diffusers takes ten seconds to import.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def base():
    from lowrank_diffusion.tiny.pretrain import untrained

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return untrained().unet.requires_grad_(False)


@pytest.fixture
def unet(base):
    """With a LoHa on the attention, drawn at random so that no gradient is zero."""
    torch.manual_seed(1)
    lowrank_core.inject(base, lowrank_core.LoHa(rank=2, target_modules=["to_q", "to_out.0"]))
    for adapter in adapters_of(base).values():
        adapter.form.init(adapter.factors, "random")
    yield base.train()
    base.disable_gradient_checkpointing()
    lowrank_core.remove(base)


def error_of(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noisy, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 32, 128)))
    added = {"text_embeds": torch.ones(2, 80), "time_ids": torch.ones(2, 6)}
    output = unet(noisy, torch.tensor([5, 600]), encoder_hidden_states=text, added_cond_kwargs=added).sample
    return (output - noisy).square().mean()


def stepped(unet) -> tuple[float, list[torch.Tensor]]:
    """A loss and its gradients."""
    loss = error_of(unet)
    return loss.item(), list(torch.autograd.grad(loss, trainable_parameters(unet)))


def assert_same_step(found, expected) -> None:
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_block_is_computed_twice_and_nothing_changes(unet, every):
    expected = stepped(unet)
    assert all(gradient.any() for gradient in expected[1])
    calls, blocks = Counter(), blocks_of(unet)
    hooks = [b.register_forward_pre_hook(lambda *_, n=name: calls.update([n])) for name, b in blocks.items()]
    recompute(unet, every)
    assert_same_step(stepped(unet), expected)
    for hook in hooks:
        hook.remove()
    # Nothing adapted lies before the first transformer block, so that nothing there has a backward pass.
    idle = {"down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "down_blocks.1.resnets.0"}
    again = set(list(blocks)[::every]) - idle
    assert calls == {name: 2 if name in again else 1 for name in blocks}


def with_dense_weights(network):
    """A copy whose layers hold what the quantized ones stand for."""
    dense = copy.deepcopy(network)
    for parent in list(dense.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QuantizedLinear):
                layer = nn.Linear(child.in_features, child.out_features, child.bias is not None).requires_grad_(False)
                layer.weight.copy_(child.dense(torch.float32))
                layer.bias = child.bias
                setattr(parent, name, layer)
    return dense


@pytest.mark.parametrize(
    ("method", "kind", "near", "rounding"),
    [
        ("lora", "nf4", 0.05, 1e-5),
        ("loha", "int8", 0.01, 1e-5),
        ("lokr", "nf4", 0.05, 1e-5),
        ("adalora", "int8", 0.01, 1e-3),  # where the dense gradients in fp32 are 2e-3 from those in float64
    ],
)
def test_a_quantized_base_trains_as_the_dense_weights_that_it_stands_for(base, method, kind, near, rounding):
    pytest.importorskip("bitsandbytes")
    unet = copy.deepcopy(base).train()
    settings = AdapterSettings(method=method, rank=2, alpha=1, target_rank=2)
    torch.manual_seed(1)
    # A convolution is among them, which stays as it is.
    lowrank_core.inject(unet, adapter_config(settings, ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1"]))
    for adapter in adapters_of(unet).values():
        adapter.form.init(adapter.factors, "random")
    plain, _ = stepped(unet)
    quantize(unet, kind, torch.device("cpu"))
    assert not [layer for layer in unet.modules() if type(layer) is nn.Linear]
    loss, gradients = stepped(unet)
    dense_loss, dense_gradients = stepped(with_dense_weights(unet))
    assert 0 < abs(loss - plain) < near * plain
    assert loss == pytest.approx(dense_loss, rel=1e-6)
    for found, expected in zip(gradients, dense_gradients, strict=True):
        assert (found - expected).norm() <= rounding * expected.norm()
    with pytest.raises(lowrank_core.UsageError, match=r"computes its weight .*quantized layer.*load the model unquant"):
        lowrank_core.merge(unet)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_torch_compile_follows_a_quantized_layer_without_a_break(kind):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)).requires_grad_(False)
    lowrank_core.inject(network, lowrank_core.LoRA(rank=2, target_modules=["0"]))
    for adapter in adapters_of(network).values():
        adapter.form.init(adapter.factors, "random")
    quantize(network, kind, torch.device("cpu"))
    inputs = torch.randn(5, 64, requires_grad=True)
    wanted = [inputs, *trainable_parameters(network)]

    def outcome(call) -> list[torch.Tensor]:
        output = call(inputs)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), wanted)]

    expected = outcome(network)
    found = outcome(torch.compile(network, backend="aot_eager", fullgraph=True))
    assert all(gradient.any() for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("number", "kind", "dora"), [(None, "nf4", False), (5, None, True)])
def test_one_offloaded_block_at_a_time_is_there_and_nothing_changes(base, number, kind, dora):
    unet = copy.deepcopy(base).train()
    settings = AdapterSettings(method="lora", dora=dora)
    lowrank_core.inject(unet, adapter_config(settings, ["to_q", "ff.net.0.proj", "conv2"]))
    for adapter in adapters_of(unet).values():
        adapter.form.init(adapter.factors, "random")
    if kind is not None:
        pytest.importorskip("bitsandbytes")
        quantize(unet, kind, torch.device("cpu"))
    expected = stepped(unet)
    recompute(unet, 1)
    blocks = list(blocks_of(unet).values())
    frozen = {block: [p for p in block.parameters() if not p.requires_grad] for block in blocks}
    sizes = {block: sum(p.numel() for p in frozen[block]) for block in blocks}
    offloaded = Offloaded(unet, number, torch.device("cpu"))
    kept = [block for block in blocks if block not in offloaded.blocks]
    assert len(kept) == (0 if number is None else len(blocks) - number)
    assert max((sizes[block] for block in kept), default=0) <= min(sizes[block] for block in offloaded.blocks)
    seen = Counter()

    def look(block, _):
        there = {other for other in blocks if all(p.numel() for p in frozen[other])}
        gone = {other for other in blocks if not any(p.numel() for p in frozen[other])}
        assert there == {offloaded.resident, *kept} - {None}
        assert gone == set(blocks) - there
        seen[block] += 1

    for block in blocks:
        block.register_forward_pre_hook(look)
    for _ in range(2):
        assert_same_step(stepped(unet), expected)
    with torch.no_grad():
        assert error_of(unet).item() == expected[0]
    assert set(seen) == set(blocks)
    assert max(seen.values()) == 2 * 2 + 1
    # What is gone is really not there.
    gone = next(block for block in offloaded.blocks if block is not offloaded.resident)
    with pytest.raises(RuntimeError):
        next(module for module in gone.modules() if isinstance(module, nn.Linear))(torch.ones(1))


def test_what_a_run_may_ask_for():
    for value, kept in {"true": True, "false": False, "2": 2}.items():
        assert load_config(None, [f"train.checkpointing={value}"]).train.checkpointing is kept
    with pytest.raises(lowrank_core.UsageError, match=r"train.checkpointing: .* greater than or equal to 0, got -1"):
        load_config(None, ["train.checkpointing=-1"])
    with pytest.raises(
        lowrank_core.UsageError, match=r"train.offload brings a block back .* set train.checkpointing: tr"
    ):
        load_config(None, ["train.offload=3", "train.checkpointing=2"])
    with pytest.raises(lowrank_core.UsageError, match=r"train.offload exchanges the weights .*; leave one out"):
        load_config(None, ["train.offload=true", "train.checkpointing=true", "train.compile=true"])
