"""A SuperLink and its SuperNodes on this machine, for the length of a run."""

import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lowrank_core import LowrankError
from lowrank_fl.config import EngineConfig
from lowrank_fl.flower.app import tether
from lowrank_fl.flower.app.connection import Connection, environment, file_of

# Flower's own programs need seconds to load.
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0


@contextmanager
def local_superlink(engine: EngineConfig, home: Path) -> Generator[Connection]:
    """Inside the block a SuperLink runs, and `engine.local_nodes` SuperNodes with it.

    Every process that was started is gone after the block, however it is left; the kill of this process included.

    Raises:
        LowrankError: a file that the configuration names is missing, or the SuperLink does not start or refuses a
            node's key; what it said is part of the message.
    """
    nodes = engine.local_nodes
    assert nodes is not None
    ports = _free_ports(1 + nodes)
    address = f"127.0.0.1:{ports[0]}"
    connection = Connection(address, engine, home)
    started: list[subprocess.Popen[bytes]] = []
    try:
        superlink = ["flower-superlink", "--disable-runtime-dependency-installation", *_superlink_tls(engine)]
        superlink += ["--host", "127.0.0.1", "--port", str(ports[0])]
        started.append(_start(superlink, home, "superlink.log"))
        _wait_until_it_listens(started[0], ports[0], home / "superlink.log")
        for node, port in enumerate(ports[1:]):
            part = f"partition-id={node} num-partitions={nodes}"
            supernode = ["flower-supernode", "--superlink", address, "--port", str(port), *_supernode_tls(engine)]
            if engine.node_keys:
                key = file_of("engine.node_keys", engine.node_keys[node])
                connection.register(file_of("engine.node_keys", f"{engine.node_keys[node]}.pub"))
                supernode += ["--auth-supernode-private-key", str(key)]
            started.append(_start([*supernode, "--node-config", part], home, f"supernode-{node}.log"))
        yield connection
    finally:
        _end(started)


def _superlink_tls(engine: EngineConfig) -> list[str]:
    if engine.certificate is None or engine.private_key is None or engine.root_certificates is None:
        return ["--insecure"]
    files = {
        "--ssl-certfile": file_of("engine.certificate", engine.certificate),
        "--ssl-keyfile": file_of("engine.private_key", engine.private_key),
        "--ssl-ca-certfile": file_of("engine.root_certificates", engine.root_certificates),
    }
    auth = ["--enable-supernode-auth"] if engine.node_keys else []
    return [*auth, *(part for option, path in files.items() for part in (option, str(path)))]


def _supernode_tls(engine: EngineConfig) -> list[str]:
    if engine.certificate is None or engine.root_certificates is None:
        return ["--insecure"]
    return ["--root-certificates", str(file_of("engine.root_certificates", engine.root_certificates))]


def _start(command: Sequence[str], home: Path, log: str) -> "subprocess.Popen[bytes]":
    """Start a program, out of Ctrl-C's reach, that ends with this process at the latest, with all that it started."""
    variables = environment(home)
    # How often a process is looked for that a message needs; Flower's second is meant for many machines.
    variables.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.1")
    with (home / log).open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-I", tether.__file__, str(_STOP_SECONDS), *command],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def _end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """End programs and all that they started."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        process.wait()


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            said = " ".join(log.read_text(encoding="utf-8", errors="replace").split()[-40:])
            raise LowrankError(f"flower-superlink does not start ({said or 'it says nothing'})")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
