"""From the options of a command line to the cases to be counted: a method under a rank rule each."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lowrank_core.errors import UsageError

if TYPE_CHECKING:
    from lowrank_core.adapters.config import AdapterConfig

ADAPTERS = ("lora", "loha", "lokr", "adalora")
DECOMPOSED = ("lora+dora", "loha+dora", "lokr+dora")
BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "float8": 1,
    "int8": 1,
}
_GAMMA, _RANK = "0.1", "8"


@dataclass(frozen=True)
class Options:
    """What the command line says of methods and ranks, as text."""

    methods: str | None
    rank: str | None
    gamma: str | None
    ratio: str | None
    budget: str | None
    compare: bool
    target_rank: int | None = None
    factor: int = -1
    tucker: bool = False


@dataclass(frozen=True)
class Case:
    """A method and what decides its ranks: `kind` is `rank`, `gamma`, `ratio`, `budget`, or empty for `original`."""

    method: str
    kind: str
    value: str

    @property
    def is_adapter(self) -> bool:
        return self.method in (*ADAPTERS, *DECOMPOSED)


def cases_of(options: Options) -> list[Case]:
    """Every method with every value of its rule, in the order they were given.

    Raises:
        UsageError: an unknown method, more than one kind of rule, or a rule that a method does not take.
    """
    from lowrank_core.replacement import METHODS

    known = ("original", *METHODS, *ADAPTERS, *DECOMPOSED)
    given = {"rank": options.rank, "gamma": options.gamma, "ratio": options.ratio, "budget": options.budget}
    kinds = [kind for kind, text in given.items() if text is not None]
    if len(kinds) > 1:
        raise UsageError(f"one rank rule at a time, got --{' and --'.join(kinds)}; give one of them")
    kind = kinds[0] if kinds else None
    if options.methods is not None:
        methods = [_method(name, known) for name in _split(options.methods, "--method")]
    elif options.compare:
        methods = [name for name in known if kind in (None, "rank", "budget") or name not in (*ADAPTERS, *DECOMPOSED)]
    elif kind:
        raise UsageError(f"--{kind} without a method; add --method, one of {', '.join(known[1:])}, or --compare")
    else:
        methods = ["original"]
    cases: list[Case] = []
    for method in methods:
        adapter = method in (*ADAPTERS, *DECOMPOSED)
        if adapter and kind in ("gamma", "ratio"):
            raise UsageError(
                f"--{kind} is a rank rule of {', '.join(METHODS)}, got method {method!r}; give --rank or --budget"
            )
        if method == "original":
            cases.append(Case("original", "", ""))
        elif kind is None:
            cases.append(Case(method, "rank", _RANK) if adapter else Case(method, "gamma", _GAMMA))
        else:
            cases += [Case(method, kind, value) for value in _split(given[kind] or "", f"--{kind}")]
    return cases


def adapter_config(case: Case, targets: Sequence[str] | str, options: Options, rank: int) -> "AdapterConfig":
    """The configuration that counting takes; its alpha changes no size."""
    from lowrank_core.adapters.config import AdaLoRA, LoHa, LoKr, LoRA

    name, _, decompose = case.method.partition("+")
    axis = "out" if decompose else None
    if name == "lora":
        return LoRA(rank=rank, target_modules=targets, weight_decompose=axis, tucker=options.tucker)
    if name == "loha":
        return LoHa(rank=rank, target_modules=targets, weight_decompose=axis, tucker=options.tucker)
    if name == "lokr":
        return LoKr(
            rank=rank, target_modules=targets, weight_decompose=axis, tucker=options.tucker, factor=options.factor
        )
    # PEFT's defaults, 12 to 8, and the paper's advice both start at one and a half times the final rank.
    target_rank = max(1, round(rank / 1.5)) if options.target_rank is None else options.target_rank
    return AdaLoRA(rank=rank, target_rank=target_rank, target_modules=targets)


def number(value: str, option: str, kind: type[int] | type[float]) -> int | float:
    """A value of an option as a number.

    Raises:
        UsageError: it is none.
    """
    try:
        return kind(value)
    except ValueError:
        words = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} takes {words} separated by commas, got {value!r}") from None


def check_at_least_one(**counts: int | None) -> None:
    """Raise a UsageError for an option that counts something and is below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {count}")


def bytes_of(dtype: str) -> int:
    """The bytes of one number.

    Raises:
        UsageError: no such dtype.
    """
    if dtype not in BYTES:
        raise UsageError(f"--dtype must be one of {', '.join(BYTES)}, got {dtype!r}")
    return BYTES[dtype]


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """`3x32x32` as numbers.

    Raises:
        UsageError: the text is no shape.
    """
    if text is None:
        return None
    sizes = text.lower().split("x")
    if not all(size.isdigit() and int(size) > 0 for size in sizes) or len(sizes) not in (1, 3):
        raise UsageError(f"--input takes CHANNELSxHEIGHTxWIDTH, such as 3x32x32, or a text's length, got {text!r}")
    return tuple(map(int, sizes))


def _split(text: str, option: str) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise UsageError(f"{option} takes values separated by commas, got {text!r}")
    return list(dict.fromkeys(values))


def _method(name: str, known: Sequence[str]) -> str:
    name = "lora+dora" if name == "dora" else name
    if name not in known:
        near = get_close_matches(name, known, n=2, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"methods are {', '.join(known)}"
        raise UsageError(f"unknown method {name!r}; {hint}")
    return name
