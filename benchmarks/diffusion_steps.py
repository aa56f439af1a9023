"""What `diffusion.py` times: SDXL's UNet or one of its transformer blocks, and a training step of it.

Ours is the step of `lowrank_diffusion.trainer.Trainer` itself; all others are trained by a plain loop as in diffusers'
scripts. Both are given the same noisy latents on the device, so nothing is loaded or drawn while the clock runs.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_core import adapters_of
from lowrank_core.compilation import compile
from lowrank_core.costs.trace import trace
from lowrank_diffusion import sdxl
from lowrank_diffusion.adapting import Adapters
from lowrank_diffusion.config import DiffusionConfig, LossConfig
from lowrank_diffusion.devices import make_accelerator
from lowrank_diffusion.encoding import Text
from lowrank_diffusion.examples import Batch
from lowrank_diffusion.noise import training_noise
from lowrank_diffusion.trainer import Trainer

Step = Callable[[], float]
"""One training step; returns its loss."""

_NOISE = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
"""SDXL's."""


class Block(nn.Module):
    """A transformer block, called as the UNet is. Its input needs a gradient, as in the middle of the UNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.block = BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=2048)

    def forward(self, noisy: Tensor, times: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        tokens = noisy.flatten(2).transpose(1, 2).contiguous()
        tokens = tokens.requires_grad_(torch.is_grad_enabled())
        answer = self.block(tokens, encoder_hidden_states=encoder_hidden_states)
        return (answer.transpose(1, 2).unflatten(2, noisy.shape[2:]),)


@dataclass(frozen=True)
class Case:
    """A network and the sizes of what it reads."""

    build: Callable[[], nn.Module]
    channels: int
    side: int
    """Of the latents, or of a block's square of tokens."""
    text: int
    pooled: int

    def shapes(self, batch: int) -> tuple[tuple[int, ...], ...]:
        """Of the latents, time steps, text's states, pooled text and time ids."""
        latents = (batch, self.channels, self.side, self.side)
        return latents, (batch,), (batch, 77, self.text), (batch, self.pooled), (batch, 6)


def case_of(name: str, *, quick: bool) -> Case:
    """`640` or `1280`: a block of that width with the tokens of a picture of 1024 pixels; `unet`: the whole UNet.

    quick: few tokens, and for `unet` the tiny SDXL's.
    """
    if name != "unet":
        side = 8 if quick else {"640": 64, "1280": 32}[name]
        return Case(lambda: Block(int(name)), int(name), side, 2048, 1280)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if quick:
        from lowrank_diffusion.tiny.networks import tiny_unet

        return Case(tiny_unet, 4, 16, 128, 80)
    return Case(lambda: UNet2DConditionModel(**sdxl.UNET), 4, 128, 2048, 1280)


def noisy_batch(case: Case, size: int, device: torch.device) -> Batch:
    """Latents at random time steps, with random text."""
    latents, _, hidden, pooled, _ = case.shapes(size)
    noise, places = training_noise(_NOISE, LossConfig(), 0), range(size)
    generator = torch.Generator().manual_seed(0)
    clean, text, summary = (torch.randn(s, generator=generator).to(device) for s in (latents, hidden, pooled))
    times, drawn = noise.times(0, places).to(device), noise.noise(0, places, latents[1:]).to(device)
    side = 8.0 * case.side
    time_ids = torch.tensor([[side, side, 0, 0, side, side]] * size, device=device)
    return Batch(
        noise.noisy(clean, drawn, times), times, Text(text, summary), time_ids, noise.target(clean, drawn, times)
    )


@dataclass(frozen=True)
class How:
    """What all competitors of a case share."""

    method: str
    rank: int
    device: torch.device
    dtype: torch.dtype
    checkpointing: bool
    compiled: bool


def predict(model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    added = {"text_embeds": batch.text.pooled.to(dtype), "time_ids": batch.time_ids}
    text = batch.text.hidden.to(dtype)
    return model(
        batch.noisy.to(dtype), batch.times, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
    )[0]


def trainer_step(model: nn.Module, batch: Batch, how: How) -> Step:
    """The step of `lowrank diffusion train`, with its checks, schedule and measurements."""
    precision = "fp32" if how.dtype == torch.float32 else "bf16"
    train = {"steps": 10**9, "batch_size": len(batch.times), "precision": precision, "device": str(how.device)}
    train |= {"checkpointing": how.checkpointing, "compile": how.compiled}
    config = DiffusionConfig.model_validate({"adapter": {"method": how.method, "rank": how.rank}, "train": train})
    noise = training_noise(_NOISE, config.loss, config.seed)
    examples: Any = _Always(batch)
    trainer = Trainer(config, make_accelerator(config.train), Adapters({"unet": model}), examples, noise)
    steps = trainer.steps(lambda: False)
    return lambda: next(steps)[0].loss


class _Always:
    """Examples that are the same in every step."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, step: int, places: Sequence[int]) -> Batch:
        return self._batch


def plain_step(model: Any, batch: Batch, how: How, *, mixed: bool = True) -> Step:
    """As in diffusers' scripts: factors in fp32, the forward under autocast where the base is in bf16.

    mixed: whether under autocast; our trainer does without, so its frozen step does too.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2) if parameters else None
    model.train()
    if how.checkpointing:
        model.enable_gradient_checkpointing()
    if how.compiled:
        compile(model)

    def step() -> float:
        with autocast(how) if mixed else nullcontext():
            predicted = predict(model, batch, how.dtype)
        loss = F.mse_loss(predicted.float(), batch.target.float())
        loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def autocast(how: How) -> Any:
    """Nothing in fp32."""
    return nullcontext() if how.dtype == torch.float32 else torch.autocast(how.device.type, how.dtype)


def with_gradient(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The frozen model, with a gradient from where the first of these adapted layers would need one."""
    if isinstance(model, Block):
        return model  # asks for its own
    first = model.get_submodule("conv_in" if "conv_in" in names else "down_blocks.1.attentions.0")
    first.register_forward_pre_hook(lambda _, arguments: (arguments[0].detach().requires_grad_(), *arguments[1:]))
    return model


def products_of(case: Case, adapted: nn.Module, method: str, batch: int) -> int:
    """The fewest multiplications and additions by which an adapter can be trained a step: three products for each of
    its forward's (the output, towards the input, towards the factors), or ΔW's own gradient where that is less.
    """
    with torch.device("meta"):
        model = case.build()
        latents, times, hidden, pooled, time_ids = (torch.empty(shape) for shape in case.shapes(1))
    added = {"text_embeds": pooled, "time_ids": time_ids}
    cost = trace(model, latents, times, encoder_hidden_states=hidden, added_cond_kwargs=added)
    total = 0
    for name, adapter in adapters_of(adapted).items():
        outputs, inputs = model.get_submodule(name).weight.flatten(1).shape
        positions = batch * cost.layers[name].flops // (2 * outputs * inputs)
        if method == "lokr":
            a, c = adapter.factors["lokr_w1"].shape
            b, d = outputs // a, inputs // c
            thin = min(c * b * (d + a), a * d * (c + b))
        else:
            key, power = ("lora_A", 1) if method == "lora" else ("hada_w1_b", 2)
            thin = len(adapter.factors[key]) ** power * (inputs + outputs)
        total += min(6 * positions * thin, 2 * positions * inputs * outputs)
    return total


def products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """How many of them a plain product of a feed-forward layer's size does here; the best of several runs of a few."""
    x, weight = torch.randn(1024, 1280, device=device, dtype=dtype), torch.randn(1280, 5120, device=device, dtype=dtype)
    # On a GPU one takes less time than its launch and the waiting for it.
    best, at_once = math.inf, 100 if device.type == "cuda" else 1
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(at_once):
            x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return at_once * 2 * 1024 * 1280 * 5120 / best
