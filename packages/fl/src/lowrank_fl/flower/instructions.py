"""What a message tells a client besides arrays, read as what anyone may have sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message

from lowrank_core import LowrankError

STATE_ROUND = "state-round"
"""The last round whose reply of this client the server used; 0 if there is none."""

FACTOR_TURN = "factor-turn"
"""Under aggregation one-factor, which factor of each weight is trained (`trained_in_turn`)."""


@dataclass(frozen=True)
class Instructions:
    """The ConfigRecord `config` of a message.

    `client` is the node's `partition-id` if not given, because a node may host one client or several. `state_round` is
    the round that left what the client goes on from, 0 before its first. `turn` is the factors' turn, None where all
    of them are trained.

    Raises (`of`, `number`):
        LowrankError: something is missing or is no such number.
    """

    client: int
    round: int
    state_round: int
    turn: int | None
    config: Mapping[str, Any]

    @classmethod
    def of(cls, message: Message, context: Context) -> "Instructions":
        config = message.content.config_records.get("config", {})
        client = config.get("client", context.node_config.get("partition-id"))
        state_round, turn = config.get(STATE_ROUND, 0), config.get(FACTOR_TURN)
        return cls(
            _index("client", client),
            _index("server-round", config.get("server-round")),
            _index(STATE_ROUND, state_round),
            None if turn is None else _index(FACTOR_TURN, turn),
            config,
        )

    def number(self, name: str, default: float | None = None) -> float:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _unusable(name, value)
        return float(value)


def _index(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _unusable(name, value)
    return value


def _unusable(name: str, value: object) -> LowrankError:
    return LowrankError(
        f"the message's config has {name} {value!r}, which is no usable number; let a Wire send the messages of a "
        "strategy that gives it"
    )
