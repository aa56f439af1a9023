"""The same configuration gives the same bits, whatever carries its messages."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from cases import one_more_trial
from test_run import Watcher

from lowrank_core import LowrankError
from lowrank_fl.flower.app.connection import environment
from lowrank_fl.flower.app.trial import _free_ports, local_superlink
from lowrank_fl.load import load_config
from lowrank_fl.run import resume, run

SMALL = [
    "data.max_examples=120",
    "federation.clients=4",
    "federation.clients_per_round=3",
    "federation.epochs=1",
    "rounds=2",
    "model.method=fedpara",
    "model.width=4",
]


def weights_of(folder: Path, *more: str) -> bytes:
    run(load_config("quickstart", [*SMALL, *more]), folder, Watcher())
    return (folder / "model.safetensors").read_bytes()


def results(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture
def started(monkeypatch):
    """`started()` is what runs of all that this test has started, however far down."""
    if sys.platform != "linux":
        pytest.skip("looks for processes in /proc")
    mark = uuid.uuid4().hex
    monkeypatch.setenv("LOWRANK_STARTED_BY", mark)

    def started() -> list[str]:
        found: list[str] = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended
                continue
        return found

    return started


@pytest.mark.slow
def test_ray_gives_the_bits_of_the_local_engine(tmp_path):
    """With a state on disk that any actor may go on with, with parts of the model that stay with the clients and are
    tested there, and with numbers that are rounded on the way.
    """
    pytest.importorskip("ray")
    settings = [*SMALL, "model.method=pfedpara", "strategy.name=scaffold", "partition.held_out=0.25", "codec.up=int8"]
    alone = tmp_path / "alone"
    for out, workers in ((alone, 1), (tmp_path / "workers", 2)):
        run(load_config("quickstart", [*settings, f"engine.workers={workers}"]), out, Watcher())
    # In a process of its own, because Ray leaves it to the interpreter's end to close its files and processes.
    command = [sys.executable, "-c", "from lowrank_cli.main import main; main()", "fl", "run", "quickstart", "--quiet"]
    command += [part for pair in [*settings, "engine.workers=2", "engine.kind=ray"] for part in ("-o", pair)]
    subprocess.run([*command, "--out", str(tmp_path / "ray")], check=True, capture_output=True)
    for other in (tmp_path / "workers", tmp_path / "ray"):
        assert (other / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
        assert results(other) == results(alone)
    assert (tmp_path / "ray" / "clients").exists()


def certificates_and_keys(folder: Path) -> list[str]:
    """Settings for TLS on loopback and two nodes that prove who they are."""
    folder.mkdir()
    (folder / "names.txt").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for command in (
        "openssl req -x509 -newkey rsa:2048 -noenc -days 2 -subj /CN=CA -keyout ca.key -out ca.pem",
        "openssl req -newkey rsa:2048 -noenc -subj /CN=localhost -keyout server.key -out server.csr",
        "openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names.txt "
        "-out server.pem",
        "ssh-keygen -q -t ecdsa -b 384 -N '' -f node-0",
        "ssh-keygen -q -t ecdsa -b 384 -N '' -f node-1",
    ):
        subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)
    files = {"root_certificates": "ca.pem", "certificate": "server.pem", "private_key": "server.key"}
    keys = [f"engine.{key}={folder / file}" for key, file in files.items()]
    return [*keys, f"engine.node_keys=[{folder / 'node-0'},{folder / 'node-1'}]"]


@pytest.mark.slow
def test_two_supernodes_give_the_bits_of_the_local_engine_and_leave_nothing_behind(tmp_path, started):
    """Over TLS, with nodes that prove who they are, where the programs that make certificates and keys are there."""
    programs = all(map(shutil.which, ("openssl", "ssh-keygen")))
    secured = certificates_and_keys(tmp_path / "secrets") if programs else []
    chosen = "strategy.name=scaffold"
    alone = weights_of(tmp_path / "alone", chosen, "engine.workers=1")
    config = load_config("quickstart", [*SMALL, chosen, *secured], local_nodes=2)
    [summary] = run(config, tmp_path / "nodes", Watcher())
    assert (tmp_path / "nodes" / "model.safetensors").read_bytes() == alone
    for found, expected in zip(results(tmp_path / "nodes"), results(tmp_path / "alone"), strict=True):
        for key, value in expected.items():
            # A real run's ids are longer than ours, which is a few bytes a message.
            assert found[key] == (pytest.approx(value, rel=0.01) if key.endswith("_bytes") else value), key
    assert summary.run_dir == str(tmp_path / "nodes")
    assert summary.rounds == 2
    assert started() == []
    # And a finished run is left as it is.
    assert resume(tmp_path / "nodes", Watcher()) == [summary]


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("openssl", "ssh-keygen"))), reason="makes keys with openssl, ssh-keygen")
def test_a_superlink_with_registered_keys_refuses_other_nodes(tmp_path):
    """A node with a registered key is taken, one without a key and one with a stranger's are not."""
    secrets, home = tmp_path / "secrets", tmp_path / "home"
    home.mkdir()
    engine = load_config("quickstart", [*SMALL, *certificates_and_keys(secrets)], local_nodes=2).engine
    engine = engine.model_copy(update={"local_nodes": 1, "node_keys": [str(secrets / "node-0")]})
    with local_superlink(engine, home) as connection:
        # Else a helper of the node holds its output open.
        supernode = ["flower-supernode", "--superlink", connection.address, "--isolation", "process"]
        supernode += ["--root-certificates", str(secrets / "ca.pem"), "--port"]
        keys = ([], ["--auth-supernode-private-key", str(secrets / "node-1")])
        others = [
            subprocess.Popen(
                [*supernode, str(port), *key],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(home),
            )
            for port, key in zip(_free_ports(2), keys, strict=True)
        ]
        without, stranger = (other.communicate(timeout=120)[0] for other in others)
        assert "All SuperNodes must be registered" in without
        assert "Failed to activate SuperNode" in stranger
        assert all(other.returncode for other in others)
        deadline = time.monotonic() + 60
        while "SuperNode ID" not in (home / "supernode-0.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)


@one_more_trial
@pytest.mark.slow
def test_a_failure_on_the_supernodes_is_the_commands_own(tmp_path):
    config = load_config("quickstart", [*SMALL, "federation.lr=1e20"], local_nodes=1)
    with pytest.raises(LowrankError, match=r"cannot be used in round 1: training diverged"):
        run(config, tmp_path / "run", Watcher())


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(["--local-nodes", "2"], id="superlink"),
        pytest.param(["--engine", "ray", "-o", "engine.workers=2"], id="ray", marks=one_more_trial),
    ],
)
def test_ctrl_c_keeps_the_finished_rounds_and_leaves_no_process(tmp_path, started, engine):
    out = tmp_path / "run"
    settings = [part for pair in [*SMALL, "rounds=100000"] for part in ("-o", pair)]
    command = [sys.executable, "-c", "from lowrank_cli.main import main; main()", "fl", "run", "quickstart", *settings]
    process = subprocess.Popen(
        [*command, *engine, "--json", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 600
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert json.loads(printed)["interrupted"]
    assert "Traceback" not in said
    assert (out / "model.safetensors").exists()
    deadline = time.monotonic() + 30
    while started():
        assert time.monotonic() < deadline, started()
        time.sleep(0.2)
    rounds = len(metrics.read_text().splitlines())
    assert f"error: interrupted after {rounds} finished rounds, which are kept in {out}" in said
