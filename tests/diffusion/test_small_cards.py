"""What makes a run fit on a small card: fewer activations kept."""

from collections import Counter

import pytest
import torch

import lowrank_core
from lowrank_core.adapters.control import adapters_of, trainable_parameters
from lowrank_diffusion.blocks import blocks_of, recompute
from lowrank_diffusion.load import load_config

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


def stepped(unet) -> tuple[float, list[torch.Tensor]]:
    """A loss and its gradients."""
    generator = torch.Generator().manual_seed(5)
    noisy, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 32, 128)))
    added = {"text_embeds": torch.ones(2, 80), "time_ids": torch.ones(2, 6)}
    output = unet(noisy, torch.tensor([5, 600]), encoder_hidden_states=text, added_cond_kwargs=added).sample
    loss = (output - noisy).square().mean()
    parameters = trainable_parameters(unet)
    return loss.item(), list(torch.autograd.grad(loss, parameters))


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


def test_a_run_says_how_much_is_recomputed():
    for value, kept in {"true": True, "false": False, "2": 2}.items():
        assert load_config(None, [f"train.checkpointing={value}"]).train.checkpointing is kept
    with pytest.raises(lowrank_core.UsageError, match=r"train.checkpointing: .* greater than or equal to 0, got -1"):
        load_config(None, ["train.checkpointing=-1"])
