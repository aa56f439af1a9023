"""Training loops that others wrote: transformers' Trainer, accelerate, and data parallelism over two processes."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from adaptive_models import batch, small_model, trained
from adaptive_worker import parallel_run
from torch import Tensor, nn

from lowrank_core.adapters.config import AdaLoRA
from lowrank_core.adapters.inject import inject
from lowrank_core.adaptive import AdaptiveRank, adapt_ranks
from lowrank_core.adaptive import allocator as allocator_module

pytestmark = pytest.mark.slow
STEPS = 20
CONFIG = AdaptiveRank(target_rank=2, warmup=0.1, settle=0.3)


class Regression(nn.Module):
    """What the Trainer takes: a module that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = [
            dict(zip(("x", "labels"), pair, strict=True)) for n in range(10) for pair in zip(*batch(n), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def regression(seed=0) -> Regression:
    torch.manual_seed(seed)
    return inject(Regression(), AdaLoRA(rank=4, target_rank=2, settle=0.3, target_modules=["net.0", "net.2"]))


def arguments(folder, **options):
    from transformers import TrainingArguments

    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 16, "report_to": [], "save_strategy": "no"}
    return TrainingArguments(str(folder), **{**defaults, "use_cpu": True, "disable_tqdm": True, **options})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["given", "created"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer_ends_at_the_target_unchanged(tmp_path, way, accumulation):
    from transformers import Trainer

    model = regression()
    options = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    if way == "given":
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        adapt_ranks(optimizer, model, STEPS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        trainer = Trainer(model, options, train_dataset=Rows(), optimizers=(optimizer, scheduler))
    else:

        class Adaptive(Trainer):
            def create_optimizer(self, *args, **kwargs):
                optimizer = super().create_optimizer(*args, **kwargs)
                adapt_ranks(optimizer, self.model, self.args.max_steps)
                return optimizer

        trainer = Adaptive(model, options, train_dataset=Rows())
    trainer.train()
    assert sum(p.shape[0] for n, p in model.named_parameters() if n.endswith("lora_E")) == 4


@pytest.mark.filterwarnings("ignore")
def test_a_trainers_checkpoint_resumes_to_the_same_bits(tmp_path):
    from transformers import Trainer

    def trainer(folder, seed, **options):
        model = regression(seed)
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        adapt_ranks(optimizer, model, STEPS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        made = arguments(folder, save_strategy="steps", save_steps=7, **options)
        return model, Trainer(model, made, train_dataset=Rows(), optimizers=(optimizer, scheduler))

    model, whole = trainer(tmp_path, 0)
    whole.train()
    for killed in (7, 14):
        again, resumed = trainer(tmp_path, 0)  # what is frozen must be the same; the rest is loaded
        resumed.train(resume_from_checkpoint=str(Path(tmp_path) / f"checkpoint-{killed}"))
        for a, b in zip(again.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_optimizers_wrapped_by_accelerate_are_unwrapped_before_or_after():
    from accelerate import Accelerator

    found = []
    for first in (True, False, None):
        torch.manual_seed(3)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = small_model()
        optimizer = torch.optim.Adam(trained(model), lr=0.05)
        if first:
            allocator = adapt_ranks(optimizer, model, STEPS, CONFIG)
        model, optimizer = accelerator.prepare(model, optimizer)
        if not first:
            allocator = adapt_ranks(optimizer if first is False else optimizer.optimizer, model, STEPS, CONFIG)
        for step in range(STEPS):
            for _ in range(2):
                with accelerator.accumulate(model):
                    x, y = batch(step)
                    accelerator.backward(nn.functional.mse_loss(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
        assert allocator.step == STEPS
        found.append(allocator.rank_pattern())
    assert found[0] == found[1] == found[2]
    assert sum(map(sum, found[0].values())) == 4


def test_two_processes_decide_alike_and_shrink_when_asked(tmp_path):
    torch.multiprocessing.spawn(parallel_run, (str(tmp_path),), nprocs=2)
    (patterns, whole, lost, after), second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert patterns == second[0]
    assert sum(map(sum, patterns[-1].values())) == 4
    assert set(patterns[-1]) == {"0", "2"}
    for a, b in zip([*whole, *after], [*second[1], *second[3]], strict=True):
        assert torch.equal(a, b)
    assert lost == sum(p.numel() for p in whole) - sum(p.numel() for p in after) > 0
    assert all(p.shape[0] == 4 for p in whole[::3])


def test_without_a_group_of_processes_nothing_speaks_against_shrinking():
    assert not allocator_module.in_process_group()
    assert os.environ.get("WORLD_SIZE", "1") == "1"
