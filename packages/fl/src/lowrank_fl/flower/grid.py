"""Flower's Grid in this process: messages reach the clients by function call or through worker processes."""

from collections.abc import Callable, Iterable, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lowrank_fl.flower.records import DOWNLINK_SLOT, ArrayRecord, array_records, to_arrays, to_record

Execute = Callable[[Sequence[Message]], Sequence[Message]]

RUN_ID = 1
_SERVER_NODE = 0


def client_of(node_id: int) -> int:
    """The client's index; node ids count from 1, because the server is node 0."""
    return node_id - 1


def make_context(client: int, clients: int) -> Context:
    """What a ClientApp learns about itself, as Flower's simulation tells it."""
    return Context(
        run_id=RUN_ID,
        node_id=client + 1,
        node_config={"partition-id": client, "num-partitions": clients},
        state=RecordDict(),
        run_config={},
    )


class ClientsGrid(Grid):
    """A Grid whose nodes are the clients 0 to `clients` - 1, and which answers rounds whole."""

    def __init__(self, clients: int) -> None:
        self._clients = clients

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError("rounds are answered whole: use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError("rounds are answered whole: use send_and_receive")


class LocalGrid(ClientsGrid):
    """A Grid over clients 0 to `clients` - 1, each a node of its own. Replies come in the order of the clients,
    whatever the order they were trained in, so that sums over them always have the same bits.
    """

    def __init__(self, clients: int, execute: Execute, *, shared: bool) -> None:
        super().__init__(clients)
        self._shared = shared
        self._execute = execute
        self._run = Run.create_empty(RUN_ID)
        # Flower lets only a task of its own runtime make messages; in this process we are that runtime.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, _SERVER_NODE

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Hand the messages to their clients and wait for every reply. There is no timeout: nothing can get lost."""
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        laid_out: dict[int, ArrayRecord] = {}
        for number, message in enumerate(ordered):
            message.metadata.__dict__["_message_id"] = str(number + 1)  # a reply must name what it replies to
            message.content = self._lay_out(message.content, laid_out)
        return list(self._execute(ordered))

    def _lay_out(self, content: RecordDict, done: dict[int, ArrayRecord]) -> RecordDict:
        """The same content with arrays in one block each; a record that many messages carry is laid out once."""
        records = array_records(content)
        for record in records.values():
            if id(record) not in done:
                slot = DOWNLINK_SLOT if not done else None
                done[id(record)] = to_record(to_arrays(record), shared=self._shared, slot=slot)
        return RecordDict({**content, **{name: done[id(r)] for name, r in records.items()}})
