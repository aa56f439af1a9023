"""Runs on a SuperLink, up to where Flower's programs begin."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from test_run import Watcher

from lowrank_core import LowrankError, UsageError
from lowrank_fl.config import EngineConfig, RunConfig
from lowrank_fl.flower.app import client, connection, submit, trial
from lowrank_fl.flower.app.collect import Collector
from lowrank_fl.flower.app.connection import Connection
from lowrank_fl.flower.app.events import Listener, Teller
from lowrank_fl.flower.app.settings import Settings, read_settings, write_settings
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.interruption import interruptible
from lowrank_fl.load import load_config
from lowrank_fl.results import RoundRow, RunStart, RunSummary
from lowrank_fl.run import Interrupted, run


def row(number: int) -> RoundRow:
    return RoundRow(number, 0.5, 1.0, 1.0, 10, 10, 20, 1.0, [0, 1])


def summary(**given) -> RunSummary:
    return RunSummary("made", "/far/away", "fedpara", 0, 1, 0.5, 1.0, 1, 1, 1, 10, 10, 20, 1.0, **given)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["engine.kind=superlink"],
            "superlink takes either address (HOST:PORT of a SuperLink that runs) or local_nodes",
        ),
        (["engine.kind=superlink", "engine.address=h:1", "engine.local_nodes=2"], "got both"),
        (["engine.kind=superlink", "engine.address=host"], "address is HOST:PORT, got 'host'"),
        (["engine.local_nodes=2"], "local_nodes belongs to engine.kind superlink, not local; add --engine superlink"),
        (
            ["engine.server_folder=a"],
            "server_folder belongs to engine.kind superlink, not local; add",
        ),
        (["engine.kind=ray", "engine.certificate=a.pem"], "certificate belongs to engine.kind superlink, not ray"),
        (["engine.wait_for_nodes=5"], "wait_for_nodes belongs to engine.kind superlink, not local"),
        (["engine.timeout=5"], "timeout belongs to engine.kind ray and superlink, not local, which loses no reply"),
        (["engine.kind=ray", "engine.address=h:1"], "address belongs to engine.kind superlink, not ray"),
        (
            ["engine.kind=superlink", "engine.address=h:1", "engine.insecure=true", "engine.root_certificates=ca.pem"],
            "insecure means no TLS, so root_certificates has no use; leave one of them out",
        ),
        (
            ["engine.kind=superlink", "engine.local_nodes=2", "engine.certificate=a.pem"],
            "certificate and private_key go together, with root_certificates and local_nodes",
        ),
        (
            ["engine.kind=superlink", "engine.local_nodes=2", "engine.node_keys=[a]"],
            "node_keys takes one key for each of local_nodes, and a certificate: Flower wants TLS for it",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(keys, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        load_config("quickstart", keys)


def test_local_nodes_as_a_flag_means_superlink():
    engine = load_config("quickstart", local_nodes=2).engine
    assert (engine.kind, engine.local_nodes) == ("superlink", 2)


def test_settings_come_through_flowers_run_configuration():
    config = load_config("quickstart", ["data.path=\"a 'b' \\u03b3\""], local_nodes=1)
    settings = Settings(config, "/out", "/states", "made-1")
    assert read_settings(write_settings(settings)) == settings


def test_a_configuration_of_another_version_is_named():
    written = json.dumps({**json.loads(RunConfig().model_dump_json()), "later": 1})
    with pytest.raises(LowrankError, match=r"cannot read the run's configuration \(later\); submit it with lowrank"):
        read_settings({"config": written})
    with pytest.raises(LowrankError, match="cannot read the run's configuration"):
        read_settings({})


@pytest.mark.parametrize("name", ["", "..", "../other", "/tmp/other", "a b"])
def test_a_runs_name_that_is_no_folders_is_refused(name):
    said = re.escape(f"'.', '_' and '-' alone, got {name!r}; submit it with lowrank fl run")
    with pytest.raises(LowrankError, match=said):
        read_settings(write_settings(Settings(RunConfig(), "", "", name)))


def test_what_a_serverapp_tells_reaches_the_observer(capsys):
    class Notes(Watcher):
        def note(self, text):
            notes.append(text)

    notes: list[str] = []
    teller, watcher = Teller(), Notes()
    listener = Listener(watcher)
    start = RunStart("made", 0, 1, "fedpara", 1, 1, 1, {})
    teller.note("a\nb")
    teller.run_started(start)
    teller.round_ended(row(1))
    teller.run_ended(summary())
    teller.done([summary()])
    assert all(map(listener.hear, capsys.readouterr().out.splitlines()))
    assert notes == ["a\nb"]
    assert watcher.rows == [row(1)]
    assert listener.summaries == [summary()]
    assert not listener.stopped
    assert not listener.hear("INFO : something of Flower's own")
    teller.failed(LowrankError("no data"))
    listener.hear(capsys.readouterr().out)
    assert listener.error == "no data"


def test_a_run_elsewhere_leaves_its_numbers_here(tmp_path):
    config = load_config("quickstart", ["rounds=1"], local_nodes=1, sweep=["seed=3,4"])
    config = config.model_copy(update={"sweep": {"seed": [3, 4]}})
    collector = Collector(config, tmp_path, Watcher())
    for index, seed in enumerate((3, 4)):
        for _ in range(2):  # told again after a resume
            collector.run_started(RunStart("made", index, 2, "fedpara", 1, 1, 1, {"seed": seed}))
            collector.round_ended(row(1))
        collector.run_ended(summary(swept={"seed": seed}))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["sweep"] == {"seed": [3, 4]}
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == seed
        assert [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1]
        assert json.loads((folder / "summary.json").read_text())["run_dir"] == str(folder)


def test_a_client_finds_its_data_its_run_and_its_states_through_its_node(tmp_path, monkeypatch):
    LocalGrid(1, lambda messages: [], shared=False)
    asked: list[tuple[RunConfig, Path]] = []
    monkeypatch.setattr(client, "resident_of", lambda text, states: asked.append((_config(text), states)))
    config = load_config("quickstart", [], local_nodes=1).model_copy(update={"sweep": {"seed": [3, 4]}})
    run_config = write_settings(Settings(config, "", "", "made-1"))

    def ask(node_config, run_config, **more):
        message = Message(RecordDict({"config": ConfigRecord({"client": 0, **more})}), 1, "train")
        client._find(message, Context(1, 1, node_config, RecordDict(), run_config))
        return asked.pop()

    node = {"partition-id": 0, "data-path": "/mnt/data", "state-folder": str(tmp_path), "device": "cuda:1"}
    found, states = ask(node, run_config, run=1)
    assert (found.seed, found.data.path, found.device) == (4, "/mnt/data", "cuda:1")
    assert states == tmp_path / "made-1" / "4" / "clients"
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    found, states = ask({}, run_config)
    assert (found.seed, found.data.path, found.device) == (3, None, "cpu")
    assert states == tmp_path / "cache" / "clients" / "made-1" / "3" / "clients"
    # A node says where the run to start from lies, and not whether there is one.
    assert ask({"model-start": "/mnt/start"}, run_config)[0].model.start is None
    model = config.model.model_copy(update={"start": "/start"})
    begun = write_settings(Settings(config.model_copy(update={"model": model}), "", "", "made-1"))
    assert ask({"model-start": "/mnt/start"}, begun)[0].model.start == "/mnt/start"
    assert ask({}, begun)[0].model.start == "/start"
    single = config.model_copy(update={"sweep": {}})
    submitted = write_settings(Settings(single, "", "/run", "made-1"))
    assert ask({}, submitted)[1] == Path("/run/clients")
    # What a submitter says does not lead out of the folder that the node has for it.
    assert ask({"state-folder": str(tmp_path)}, submitted)[1] == tmp_path / "made-1" / "clients"


def _config(text: str) -> RunConfig:
    return RunConfig.model_validate_json(text)


@pytest.mark.slow
def test_importing_the_nodes_app_does_not_import_torch():
    """A SuperNode starts a process for each message, the first of which only asks for its part."""
    code = "import sys, lowrank_fl.flower.app.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("address", "keys", "written"),
    [
        ("127.0.0.1:9", {}, {"insecure": True}),
        ("[::1]:9", {}, {"insecure": True}),
        ("far.example:9", {}, {}),
        ("far.example:9", {"insecure": True}, {"insecure": True}),
        ("127.0.0.1:9", {"root_certificates": "ca.pem"}, {"root-certificates": "ca.pem"}),
    ],
)
def test_only_loopback_goes_without_tls_unasked(tmp_path, monkeypatch, address, keys, written):
    import tomllib

    monkeypatch.chdir(tmp_path)
    (tmp_path / "ca.pem").touch()
    Connection(address, EngineConfig(kind="superlink", address=address, **keys), tmp_path)
    found = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]["lowrank"]
    if "root-certificates" in written:
        written = {"root-certificates": str(tmp_path / "ca.pem")}
    assert found == {"address": address, **written}


def test_a_certificate_that_is_not_there_is_named(tmp_path):
    engine = EngineConfig(kind="superlink", address="h:1", root_certificates=str(tmp_path / "ca.pem"))
    with pytest.raises(LowrankError, match=r"engine\.root_certificates names .*ca\.pem, which is no file"):
        Connection("h:1", engine, tmp_path)


def programs(folder: Path, monkeypatch, **scripts: str) -> None:
    """Stand-ins for Flower's programs."""
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    found = {"PATH": f"{folder}:/usr/bin:/bin"}
    monkeypatch.setattr(connection, "environment", lambda home: found)
    monkeypatch.setattr(trial, "environment", lambda home: dict(found))


def submitted(tmp_path: Path, **more):
    config = load_config("quickstart", ["engine.kind=superlink", "engine.address=127.0.0.1:9"])
    return run(config, tmp_path / "out", Watcher())


posix = pytest.mark.skipif(sys.platform == "win32", reason="stand-ins are shell scripts")


@posix
def test_a_superlink_that_does_not_take_the_run_is_quoted(tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch, flwr="""echo '{"success": false, "error-message": "not today"}'; exit 1""")
    with pytest.raises(LowrankError, match=r"at 127.0.0.1:9 does not answer flwr run \(not today\); check engine"):
        submitted(tmp_path)


@posix
def test_a_run_that_ends_without_a_result_is_a_failure(tmp_path, monkeypatch):
    script = """case $1 in
        run) echo 'started'; echo '{"success": true, "run-id": "7"}';;
        log) echo 'ImportError: no lowrank_fl';;
        ls) echo '{"success": true, "runs": [{"status": "finished:failed", "details": "gone"}]}';;
    esac"""
    programs(tmp_path, monkeypatch, flwr=script)
    said = r"without a result \(finished:failed gone\): ImportError: no lowrank_fl"
    with pytest.raises(LowrankError, match=said):
        submitted(tmp_path)


@posix
def test_a_run_that_somebody_stops_is_interrupted(tmp_path, monkeypatch):
    script = """case $1 in
        run) echo '{"success": true, "run-id": "7"}';;
        log) echo 'nothing of ours';;
        ls) echo '{"success": true, "runs": [{"status": "finished:stopped", "details": ""}]}';;
    esac"""
    programs(tmp_path, monkeypatch, flwr=script)
    with pytest.raises(Interrupted, match="interrupted after 0 finished rounds"):
        submitted(tmp_path)


@posix
def test_ctrl_c_stops_the_run_and_counts_the_rounds_that_were_told(tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    script = f"""echo $1 >> {asked}
    case $1 in
        run) echo '{{"success": true, "run-id": "7"}}';;
        log) echo "$EVENTS"; sleep 60;;
        stop) echo '{{"success": true}}';;
    esac"""
    events = [
        ["run_started", dataclasses.asdict(RunStart("made", 0, 1, "fedpara", 9, 1, 1, {}))],
        ["round_ended", dataclasses.asdict(row(1))],
        ["round_ended", dataclasses.asdict(row(2))],
        ["note", "now"],
    ]
    told = "\n".join("lowrank-fl: " + json.dumps(event) for event in events)
    programs(tmp_path, monkeypatch, flwr=script.replace('"$EVENTS"', f"'{told}'"))

    class PressCtrlC(Watcher):
        def note(self, text):
            raise KeyboardInterrupt

    config = load_config("quickstart", ["engine.kind=superlink", "engine.address=far.example:9"])
    with pytest.raises(Interrupted, match="interrupted after 2 finished rounds, which are kept in"):
        run(config.model_copy(update={"sweep": {}}), tmp_path / "out", PressCtrlC())
    assert asked.read_text().split() == ["run", "log", "stop"]


def test_sigterm_interrupts_once():
    def be_told_twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # ignored by now
            ended_in_order.append(True)

    ended_in_order: list[bool] = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        be_told_twice()
    assert ended_in_order
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@posix
def test_a_superlink_that_does_not_start_is_quoted(tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch, flower_superlink="echo no port left; exit 3")
    with pytest.raises(LowrankError, match=r"flower-superlink does not start \(no port left\)"):
        run(load_config("quickstart", local_nodes=1), tmp_path / "out", Watcher())


@pytest.mark.slow
@posix
@pytest.mark.parametrize("session", ["", "setsid "], ids=["of its own session", "in another session"])
@pytest.mark.parametrize("deaf", [False, True])
def test_ending_a_program_ends_what_it_started(tmp_path, monkeypatch, session, deaf):
    if session and shutil.which("setsid") is None:
        pytest.skip("starts a session with setsid")
    trap = 'trap "" TERM; ' if deaf else ""
    below = f'{session}sh -c \'{trap}echo $$ > "$0"; while :; do sleep 0.1; done\' "$0.pid"'
    programs(tmp_path, monkeypatch, flower_superlink=f"{trap}{below} & while :; do sleep 0.1; done")
    monkeypatch.setattr(trial, "_STOP_SECONDS", 0.3)
    pid = tmp_path / "flower-superlink.pid"
    process = trial._start([str(tmp_path / "flower-superlink")], tmp_path, "log")
    while not pid.exists() or not pid.read_text().strip():
        time.sleep(0.01)
    assert is_alive(pid)
    trial._end([process])
    assert not is_alive(pid)


def is_alive(pid_file: Path) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid_file.read_text().strip()], capture_output=True, text=True)
    return state.stdout.strip() != "" and not state.stdout.startswith("Z")


@pytest.mark.slow
@posix
def test_programs_end_when_the_process_that_started_them_is_killed(tmp_path):
    program, pid = tmp_path / "program", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {pid}.new; mv {pid}.new {pid}; sleep 600\n")
    program.chmod(0o755)
    code = (
        "import sys, time; from pathlib import Path; from lowrank_fl.flower.app import trial; "
        "home = Path(sys.argv[1]); kept = trial._start([str(home / 'program')], home, 'log'); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not pid.exists():
        assert parent.poll() is None
        time.sleep(0.01)
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_a_resumed_run_keeps_the_name_it_has_on_other_machines(tmp_path):
    assert submit._run_of(tmp_path, "made") == submit._run_of(tmp_path, "made")
    assert submit._run_of(tmp_path, "made").startswith("made-")
