"""Flower's command line, as a program: submitting a run, reading its log, stopping it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lowrank_core import LowrankError
from lowrank_fl.config import EngineConfig

_BUNDLE = Path(__file__).parent / "bundle"
_NAME = "lowrank"


def environment(home: Path) -> dict[str, str]:
    """What Flower's programs run under: a home of their own, the programs of this Python, no calls to anybody else."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def is_loopback(address: str) -> bool:
    """Whether only this machine can be meant."""
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def file_of(key: str, path: str) -> Path:
    """The file that a key of the configuration names; raises LowrankError where there is none."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise LowrankError(f"{key} names {file}, which is no file")
    return file


class Connection:
    """The way to one SuperLink."""

    def __init__(self, address: str, engine: EngineConfig, home: Path) -> None:
        self.address = address
        self._home = home
        keys = [f"address = {json.dumps(address)}"]
        if engine.insecure or (engine.root_certificates is None and is_loopback(address)):
            keys.append("insecure = true")
        elif engine.root_certificates is not None:
            certificates = file_of("engine.root_certificates", engine.root_certificates)
            keys.append(f"root-certificates = {json.dumps(str(certificates))}")
        (home / "config.toml").write_text("\n".join([f"[superlink.{_NAME}]", *keys, ""]), encoding="utf-8")

    def submit(self, settings: dict[str, str]) -> str:
        """Start a run and return its id.

        Raises:
            LowrankError: the SuperLink is not there, or does not take the run.
        """
        file = self._home / "run.toml"
        # A JSON string is a TOML string.
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
        answer = self._ask("run", str(_BUNDLE), _NAME, "--run-config", str(file))
        return str(answer["run-id"])

    def register(self, public_key: Path) -> None:
        """Let the node with this key in; raises LowrankError where the SuperLink does not take the key."""
        self._ask("supernode", "register", str(public_key), _NAME)

    def log(self, run: str) -> "subprocess.Popen[str]":
        """A process that writes the run's log to its stdout, as it grows, and ends with the run."""
        return subprocess.Popen(
            ["flwr", "log", run, _NAME, "--stream"],
            env=environment(self._home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that Ctrl-C leaves it alone
        )

    def stop(self, run: str) -> None:
        self._ask("stop", run, _NAME)

    def state(self, run: str) -> str:
        """How the run stands, in Flower's words."""
        rows = self._ask("ls", _NAME, "--run-id", run)["runs"]
        return " ".join(str(rows[0].get(key, "")) for key in ("status", "details")).strip()

    def _ask(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            env=environment(self._home),
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        start = done.stdout.find("{")
        answer = json.loads(done.stdout[start:]) if start >= 0 else {}
        if done.returncode or not answer.get("success"):
            command = " ".join(arguments[: 2 if arguments[0] == "supernode" else 1])
            said = str(answer.get("error-message") or done.stderr or done.stdout)
            raise LowrankError(
                f"the SuperLink at {self.address} does not answer flwr {command} ({' '.join(said.split())}); "
                "check engine.address, engine.root_certificates and that it runs"
            )
        return answer
