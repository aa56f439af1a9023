"""Which weights of a model could become factors, and which of them are meant."""

# torch leaves the types of modules it yields partly open.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.layers.lstm import weight_names


@dataclass(frozen=True)
class LeftEntry:
    """A weight that stayed as it was, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A weight that could become factors."""

    module_name: str
    weight_name: str
    type: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        # A layer with one weight goes by its own name.
        return self.module_name if self.weight_name == "weight" else f"{self.module_name}.{self.weight_name}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def find_candidates(model: nn.Module) -> tuple[list[Candidate], list[LeftEntry]]:
    """The weights of every Linear, Conv2d and LSTM that can become factors, and those that cannot.

    Raises:
        LowrankError: there is none, or the model is itself such a layer.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    candidates: list[Candidate] = []
    left: list[LeftEntry] = []
    for name, module in model.named_modules():
        kind = next((k for k in (nn.Linear, nn.Conv2d, nn.LSTM) if isinstance(module, k)), None)
        if kind is None:
            continue
        if not name:
            raise LowrankError(f"a bare {kind.__name__} cannot be replaced in place; put it in an nn.Sequential first")
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            left.append(LeftEntry(name, f"padding_mode {module.padding_mode!r} is not covered"))
            continue
        if isinstance(module, nn.LSTM) and module.proj_size:
            left.append(LeftEntry(name, "a projected LSTM is not covered"))
            continue
        for weight in weight_names(module) if isinstance(module, nn.LSTM) else ["weight"]:
            parameter = getattr(module, weight)
            candidate = Candidate(name, weight, kind.__name__, tuple(parameter.shape))
            if owners[id(parameter)] > 1:
                left.append(LeftEntry(candidate.name, "the weight is shared with another module"))
            else:
                candidates.append(candidate)
    if not candidates:
        raise LowrankError("no Linear, Conv2d or LSTM to factorize in this model")
    return candidates, left


def select(
    candidates: Sequence[Candidate], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Candidate], list[LeftEntry]]:
    """The candidates that `include` names and `exclude` does not, and the others with the reason."""
    check_patterns([p for p in include if p != "*"] + list(exclude), candidates)
    chosen: list[Candidate] = []
    left: list[LeftEntry] = []
    for candidate in candidates:
        if not any(matches(candidate.name, p) for p in include):
            left.append(LeftEntry(candidate.name, "not included"))
        elif any(matches(candidate.name, p) for p in exclude):
            left.append(LeftEntry(candidate.name, "excluded"))
        else:
            chosen.append(candidate)
    return chosen, left


def check_patterns(patterns: Iterable[str], candidates: Sequence[Candidate]) -> None:
    """Raise a UsageError, with the nearest names, for a pattern that matches no layer."""
    names = [c.name for c in candidates]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            nearest = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            quoted = ", ".join(f'"{name}"' for name in nearest)
            raise UsageError(f'no layer matches "{pattern}"; nearest: {quoted}')


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern names a layer, or a module that the layer is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
