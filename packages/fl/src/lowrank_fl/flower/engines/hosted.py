"""Clients as nodes 1, 2, ... over a Flower grid whose nodes host several clients each."""

import time
from collections.abc import Iterable, Mapping

import httpx
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from lowrank_core import LowrankError
from lowrank_fl.flower.grid import ClientsGrid, client_of
from lowrank_fl.flower.remote import PART

# How often the SuperLink is asked for nodes and replies, in seconds.
_INTERVAL = 0.3


class HostedGrid(ClientsGrid):
    """Sends client c's messages to the node whose `partition-id` is c modulo `num-partitions`, and returns the replies
    as if each client were a node of its own, in the order of the clients.

    A client that does not answer within `timeout` seconds (None: for ever) is left out of the replies. The nodes are
    waited for at the start, `patience` seconds at most. One that goes away later is not: its clients are left out until
    it comes back, under another id perhaps, and takes its part again.
    """

    def __init__(
        self, grid: Grid, clients: int, *, timeout: float | None, patience: float, extra: Mapping[str, int]
    ) -> None:
        """Wait for the nodes; `extra` goes into the config of every message.

        Raises:
            LowrankError: a part has no node or several, or a node does not say which part it hosts.
        """
        super().__init__(clients)
        self._grid = grid
        self._timeout = timeout
        self._patience = patience
        self._extra = dict(extra)
        self._parts: dict[int, tuple[int, int]] = {}
        self._asked: dict[str, int] = {}
        missing = self._look_for_nodes(for_all=True)
        if missing:
            raise LowrankError(f"{missing} after {patience:g} s; start it, or wait longer: -o engine.wait_for_nodes=S")

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies that come in time, in the order of the clients."""
        self._look_for_nodes(for_all=False)
        hosts, parts = self._hosts(), self._count()
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        hosted = [m for m in ordered if client_of(m.metadata.dst_node_id) % parts in hosts]
        limit = timeout or self._timeout
        ids = self._grid.push_messages(
            [self._readdressed(m, hosts[client_of(m.metadata.dst_node_id) % parts], limit) for m in hosted]
        )
        waiting = {name: message for name, message in zip(ids, hosted, strict=True) if name}
        replies: list[Message] = []
        deadline = None if limit is None else time.monotonic() + limit
        while waiting:
            for reply in self._pull(waiting):
                message = waiting.pop(reply.metadata.reply_to_message_id)
                replies.append(_reply_of_client(reply, message))
            if not waiting or (deadline is not None and time.monotonic() > deadline):
                break
            time.sleep(_INTERVAL)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def _pull(self, waiting: Iterable[str]) -> Iterable[Message]:
        try:
            return self._grid.pull_messages(list(waiting))
        except httpx.HTTPStatusError as error:
            # This is how a ServerApp learns first that its run has been stopped.
            if error.response.is_client_error:
                raise KeyboardInterrupt from error
            raise LowrankError(f"the SuperLink fails ({error}); see its own log") from None

    def _readdressed(self, message: Message, node: int, limit: float | None) -> Message:
        content = message.content
        if self._extra:
            config = ConfigRecord({**content.config_records["config"], **self._extra})
            content = RecordDict({**content, "config": config})
        about = message.metadata
        # What nobody waits for any more need not be trained either.
        return Message(content, node, about.message_type, ttl=limit, group_id=about.group_id)

    def _look_for_nodes(self, *, for_all: bool) -> str:
        """Ask new nodes for their parts; what is still missing when every part has a node or patience ends, or "".

        Nodes that are there have the time to answer, those that are not only with `for_all`.
        """
        deadline = time.monotonic() + self._patience
        before = set(self._asked)
        while True:
            present = set(self._grid.get_node_ids())
            self._parts = {node: part for node, part in self._parts.items() if node in present}
            self._asked = {name: node for name, node in self._asked.items() if node in present}
            new = sorted(present - self._parts.keys() - set(self._asked.values()))
            if new:
                questions = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
                ids = self._grid.push_messages(questions)
                self._asked |= {name: node for name, node in zip(ids, new, strict=True) if name}
            if self._asked:
                for reply in self._pull(self._asked):
                    node = self._asked.pop(reply.metadata.reply_to_message_id)
                    self._parts[node] = _part_of(node, reply)
            missing = self._missing()
            worth_waiting = for_all or self._asked.keys() - before
            if not missing or not worth_waiting or time.monotonic() > deadline:
                return missing
            time.sleep(_INTERVAL)

    def _missing(self) -> str:
        if not self._parts:
            return "no SuperNode has come"
        hosts, parts = self._hosts(), self._count()
        gone = [str(part) for part in range(parts) if part not in hosts]
        return f"no SuperNode has come with partition-id {', '.join(gone)} of {parts}" if gone else ""

    def _count(self) -> int:
        """How many parts the nodes say there are."""
        said = {parts for _, parts in self._parts.values()}
        if len(said) > 1:
            raise LowrankError(
                f"the SuperNodes disagree on num-partitions ({', '.join(map(str, sorted(said)))}); "
                "start them all with the same number"
            )
        return said.pop() if said else 1

    def _hosts(self) -> dict[int, int]:
        """The node of every part that has one."""
        hosts: dict[int, int] = {}
        for node, (part, _) in sorted(self._parts.items()):
            if part in hosts:
                raise LowrankError(
                    f"two SuperNodes host partition-id {part} ({hosts[part]} and {node}); "
                    "give each a number of its own in its --node-config"
                )
            hosts[part] = node
        return hosts


def _part_of(node: int, reply: Message) -> tuple[int, int]:
    """Which part a node hosts, of how many."""
    if reply.has_error():
        raise LowrankError(f"SuperNode {node} cannot run clients: {reply.error.reason or reply.error.code}")
    config = reply.content.config_records["config"]
    part, parts = (config.get(key) for key in PART)
    if not isinstance(part, int) or not isinstance(parts, int) or not 0 <= part < parts:
        raise LowrankError(
            f"SuperNode {node} has partition-id {part} of num-partitions {parts}; "
            "start it with --node-config 'partition-id=0 num-partitions=2', the first counting from 0"
        )
    return part, parts


def _reply_of_client(reply: Message, message: Message) -> Message:
    """A node's reply as that of the client whom the message was for."""
    return Message(reply.error if reply.has_error() else reply.content, reply_to=message)
