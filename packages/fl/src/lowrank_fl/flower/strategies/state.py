"""What a strategy knows from earlier rounds, as arrays for a checkpoint."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

# Where Flower's strategies and ours keep it: dictionaries by array, or (FedAvgM) a list in the model's order.
_DICTIONARIES = ("m_t", "v_t", "control", "h")
_LISTS = ("momentum_vector",)
# Of Flower's wrapper for differential privacy under adaptive clipping.
_NUMBERS = ("clipping_norm",)


def strategy_state(strategy: Strategy) -> dict[str, np.ndarray]:
    """Every array the strategy carries over to the next round, by `attribute/name`."""
    held: Any = strategy
    state: dict[str, np.ndarray] = {}
    for attribute in _DICTIONARIES:
        for name, value in (getattr(held, attribute, None) or {}).items():
            state[f"{attribute}/{name}"] = np.asarray(value)
    for attribute in _LISTS:
        for number, value in enumerate(getattr(held, attribute, None) or []):
            state[f"{attribute}/{number}"] = np.asarray(value)
    for attribute in _NUMBERS:
        if hasattr(held, attribute):
            state[attribute] = np.asarray(getattr(held, attribute), np.float64)
    return state


def load_strategy_state(strategy: Strategy, state: Mapping[str, np.ndarray], arrays: ArrayRecord) -> None:
    """Put a strategy where `strategy_state` found it; `arrays` is the model that the last round left."""
    held: Any = strategy
    for attribute in _DICTIONARIES:
        # In the model's order, which a file does not keep and codecs go by.
        values = {name: state[f"{attribute}/{name}"] for name in arrays if f"{attribute}/{name}" in state}
        if values:
            setattr(held, attribute, values)
    for attribute in _LISTS:
        numbered = {int(k.partition("/")[2]): v for k, v in state.items() if k.startswith(f"{attribute}/")}
        if numbered:
            setattr(held, attribute, [numbered[number] for number in sorted(numbered)])
    for attribute in _NUMBERS:
        if attribute in state:
            setattr(held, attribute, float(state[attribute]))
    if hasattr(held, "current_arrays"):
        held.current_arrays = arrays
