"""The answer of a client that failed."""

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from lowrank_core import LowrankError


def failed(message: Message, error: Exception) -> Message:
    """An error reply that says why; `federation.tolerated_failures` decides whether the run goes on without it."""
    reason = str(error) if isinstance(error, LowrankError) else f"{type(error).__name__}: {error}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
