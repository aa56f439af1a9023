"""A training step on SDXL: our trainer's against a plain diffusers loop with PEFT's and LyCORIS's adapters.

On a CPU on one transformer block of the UNet at its real width and number of tokens, with `--device cuda` on the whole
UNet with random weights. All competitors hold the same factors and the same frozen weights, and take turns step by
step. Printed are the whole step, the adapter's own share of it, and memory.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from adapter_peers import PEERS, layers_of, ours, sharing
from diffusion_steps import (
    How,
    Step,
    autocast,
    case_of,
    noisy_batch,
    plain_step,
    predict,
    products_of,
    products_per_second,
    trainer_step,
    with_gradient,
)
from machine import cores, describe, machine, plain_float32, reason_of, spread
from rich.console import Console
from rich.table import Table
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIANTS = {"plain": (False, False), "checkpointing": (True, False), "compile": (False, True), "both": (True, True)}
"""Whether activations are computed again, and whether blocks are compiled."""
FROZEN, FROZEN_MIXED = "frozen", "frozen, autocast"
"""What our step and what the plain loop's steps do without an adapter; in fp32 both are the first."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""What `lowrank diffusion train` adapts unless told otherwise."""


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    about = machine(arguments.device)
    print(describe(about))
    plain_float32()
    record: dict[str, Any] = {"machine": about, "arguments": vars(arguments), "cases": []}
    for name in arguments.cases:
        base = _frozen(name, arguments)
        variants = arguments.variants if name == "unet" else _of_blocks(arguments.variants)
        for setting in itertools.product(arguments.batches, variants, arguments.methods, arguments.ranks):
            try:
                case = measure(arguments, base, name, *setting)
            except Exception as error:  # ours or the network alone: this line is lost, and no other
                print(f"{name}, {' '.join(map(str, setting))} is left out: {reason_of(error)}", file=sys.stderr)
                continue
            finally:
                release()
            record["cases"].append(case)
            print(f"{_title(case)} is measured", file=sys.stderr)
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    print_tables(arguments, record["cases"])


def measure(
    arguments: argparse.Namespace, base: nn.Module, name: str, batch_size: int, variant: str, method: str, rank: int
) -> dict[str, Any]:
    """One setting: milliseconds of every competitor's steps, and what one of them takes in memory."""
    case = case_of(name, quick=arguments.quick)
    checkpointing, compiled = VARIANTS[variant]
    if compiled:
        # Blocks of all competitors share their code, and every one of them is a graph of its own.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 256
    how = How(method, rank, torch.device(arguments.device), DTYPES[arguments.dtype], checkpointing, compiled)
    batch, example = noisy_batch(case, batch_size, how.device), noisy_batch(case, 1, how.device)
    names = [layer for layer in layers_of(base) if arguments.target == "all" or layer.endswith(ATTENTION)]
    models: dict[str, nn.Module] = {"ours": ours(base, method, rank, names)}
    skipped: dict[str, str] = {}
    worst: dict[str, float] = {}
    for peer, build in PEERS.items():
        if not arguments.only or peer in arguments.only:
            try:
                model = build(base, method, rank, names)
                worst[peer] = check(peer, models["ours"], model, example, how)
                models[peer] = model
            except Exception as error:  # missing, or no match for this machine, or without such a layer
                skipped[peer] = reason_of(error)
            release()
    steps: dict[str, Step] = {FROZEN: plain_step(with_gradient(sharing(base), names), batch, how, mixed=False)}
    if how.dtype != torch.float32:
        steps[FROZEN_MIXED] = plain_step(with_gradient(sharing(base), names), batch, how)
    for key, model in models.items():
        steps[key] = (trainer_step if key == "ours" else plain_step)(model, batch, how)
    for key in list(steps):
        try:
            for _ in range(arguments.warm_up):
                steps[key]()
        except Exception as error:  # out of memory, or what its compilation stumbles over
            skipped[f"{key} at batch {batch_size}, {variant}"] = reason_of(error)
            del steps[key]
            if key != "ours":
                models.pop(key, None)
        release()  # only here, when the error no longer holds what lay in its frames
    milliseconds: dict[str, list[float]] = {key: [] for key in steps}
    # The first turn is not counted: what one competitor does may have the next one's blocks compiled once more.
    for turn in range(-1, arguments.repeats):
        for key, step in steps.items():
            took = timed(step, how.device)
            if turn >= 0:
                milliseconds[key].append(took)
    peaks = {key: peak_bytes(step, how.device) for key, step in steps.items()}
    # Measured at every case, since a machine's speed changes while it runs.
    floor = 1000 * products_of(case, models["ours"], method, batch_size) / products_per_second(how.device, how.dtype)
    return {
        "network": name,
        "batch": batch_size,
        "variant": variant,
        "method": method,
        "rank": rank,
        "layers": len(names),
        "milliseconds": milliseconds,
        "peak_bytes": peaks,
        "floor_ms": floor,
        "disagreement": worst,
        "skipped": skipped,
    }


def check(peer: str, ours: nn.Module, theirs: nn.Module, example: Any, how: How) -> float:
    """How far a peer is from ours; raises ArithmeticError if rounding does not explain it."""
    error = disagreement(ours, theirs, example, how)
    # LyCORIS's rebuilt weight is rounded to the base's dtype with W added and taken away again: off in bfloat16.
    rounded = peer == "LyCORIS rebuild" and how.dtype != torch.float32
    if not (error < (1e-3 if how.dtype == torch.float32 else 1e-1) or rounded):
        raise ArithmeticError(f"computes something else, {error:.1e} off")
    return error


def release() -> None:
    """Give back what nothing holds any more; trainers and compiled blocks lie in cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def disagreement(one: nn.Module, other: nn.Module, batch: Any, how: How) -> float:
    """The relative distance of two models' answers or of their factors' gradients' norms, the larger of the two."""
    answers, norms = [], []
    for model, context in ((one, nullcontext()), (other, autocast(how))):
        with context:
            answer = predict(model, batch, how.dtype).float()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad((answer - batch.target).square().mean(), trained)
        norms.append(torch.stack([gradient.float().norm() for gradient in gradients]).norm())
        answers.append(answer.detach())
    distance = (answers[0] - answers[1]).norm() / answers[0].norm()
    return max(distance.item(), ((norms[0] - norms[1]).abs() / norms[0]).item())


def timed(step: Step, device: torch.device) -> float:
    """Milliseconds of a step; it ends by reading the loss, so nothing is left in the queue but the optimizer's."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most that a step allocates beyond what it finds: activations, composed weights, gradients."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    kineto: Any = profiler.profiler
    held = peak = 0
    for event in sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def print_tables(arguments: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 170)
    peers = [peer for peer in PEERS if any(peer in case["milliseconds"] for case in cases)]
    title = f"{arguments.dtype} on {arguments.device}, {arguments.target} layers"
    whole = _table(f"A training step, {title}", "ours, ms", *(f"{peer} / ours" for peer in peers))
    own = _table(
        "The adapter's own share: the step less the frozen one of the same turn",
        *("frozen, ms", "ours, ms", *(f"{peer} / ours" for peer in peers), "floor, ms"),
    )
    memory = _table("Peak memory of a step, MiB", FROZEN, "ours", *peers)
    for case in cases:
        times, peaks = case["milliseconds"], case["peak_bytes"]
        if not {"ours", *_frozen_keys(times)} <= times.keys():
            continue  # out of memory, which is said below
        ours_frozen, peers_frozen = (times[key] for key in _frozen_keys(times))
        shares = {
            key: [a - b for a, b in zip(times[key], ours_frozen if key == "ours" else peers_frozen, strict=True)]
            for key in times
        }
        ratios = {
            peer: spread([a / b for a, b in zip(times[peer], times["ours"], strict=True)])
            for peer in peers
            if peer in times
        }
        middle = median(shares["ours"])
        own_ratios = {peer: spread([share / middle for share in shares[peer]]) for peer in peers if peer in times}
        whole.add_row(_title(case), spread(times["ours"], 1), *(ratios.get(peer, "-") for peer in peers))
        own.add_row(
            _title(case),
            spread(ours_frozen, 1),
            spread(shares["ours"], 1),
            *(own_ratios.get(peer, "-") for peer in peers),
            f"{case['floor_ms']:.1f}",
        )
        keys = (FROZEN, "ours", *peers)
        memory.add_row(_title(case), *(f"{peaks[key] / 2**20:,.0f}" if key in peaks else "-" for key in keys))
    for table in (whole, own, memory):
        console.print(table)
    print(
        f"{arguments.repeats} turns: median (min to max). Ratios of whole steps are of the same turn; those of shares "
        "are each turn's share by the\nmedian of ours. frozen: the same step without an adapter. floor: the adapter's "
        "arithmetic at the speed of plain products.\nMemory: beyond weights, factors and the optimizer's state."
    )
    for peer, reason in {key: why for case in cases for key, why in case["skipped"].items()}.items():
        print(f"skipped {peer}: {reason}")


def _frozen_keys(times: dict[str, list[float]]) -> tuple[str, str]:
    """Our step's baseline and the plain loop's."""
    return FROZEN, FROZEN_MIXED if FROZEN_MIXED in times else FROZEN


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("case", *columns):
        table.add_column(column, justify="left" if column == "case" else "right")
    return table


def _title(case: dict[str, Any]) -> str:
    variant = "" if case["variant"] == "plain" else f", {case['variant']}"
    return f"{case['network']}, batch {case['batch']}{variant}: {case['method']} r={case['rank']}"


def _frozen(name: str, arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(arguments.device):
        return case_of(name, quick=arguments.quick).build().to(DTYPES[arguments.dtype]).requires_grad_(False)


def _of_blocks(variants: list[str]) -> list[str]:
    """Those that a lone block has: there is nothing to checkpoint."""
    return [variant for variant in variants if not VARIANTS[variant][0]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, bfloat16 with CUDA")
    parser.add_argument("--cases", nargs="+", choices=["640", "1280", "unet"], help="default: 640 1280, or unet")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="default: 1 on a CPU, 1 4 with CUDA")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: plain on a CPU, all with CUDA")
    parser.add_argument("--methods", nargs="+", choices=["lora", "loha", "lokr"], default=["loha", "lora", "lokr"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--target", choices=["attention", "all"], default="attention", help="the layers to adapt")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), metavar="PEER", help="these peers alone")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--repeats", type=int, help="timed turns; default: 9")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them; default: 2")
    parser.add_argument("--quick", action="store_true", help="few tokens, the tiny SDXL's UNet and 2 turns: a trial")
    parser.add_argument("--json", metavar="FILE", help="write everything measured, case by case as it ends")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    arguments.cases = arguments.cases or (["unet"] if cuda else ["640", "1280"])
    arguments.batches = arguments.batches or ([1, 4] if cuda else [1])
    arguments.variants = arguments.variants or (list(VARIANTS) if cuda else ["plain"])
    arguments.repeats = arguments.repeats or (2 if arguments.quick else 9)
    return arguments


if __name__ == "__main__":
    main()
