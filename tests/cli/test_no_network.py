"""Commands that nothing has to be fetched for call nobody."""

import importlib
import ipaddress
import os
import socket
import sys
from pathlib import Path

import pytest

import lowrank_fl.flower
from lowrank_fl.flower.app.connection import environment

_BY_ADDRESS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_BY_NAME = ("socket.getaddrinfo", "socket.gethostbyname")
"""Audit events: the second argument of the former is an address, the first of the latter a host."""
_called: list[str] | None = None


def _refuse(event, arguments):
    if _called is None or event not in (*_BY_ADDRESS, *_BY_NAME):
        return
    address = arguments[event in _BY_ADDRESS]
    host = address[0] if isinstance(address, tuple) else address
    # A socket of Unix has a path, and one that is connected already no address.
    if host in (None, "", "localhost") or (isinstance(host, str | bytes) and os.fsencode(host)[:1] in (b"/", b"\0")):
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    _called.append(f"{event} {address!r}")
    raise ConnectionRefusedError(f"the test refuses {address!r}")


sys.addaudithook(_refuse)  # which nothing takes off again


@pytest.fixture
def called(monkeypatch):
    """What is called besides this machine; each call fails."""
    monkeypatch.setattr(sys.modules[__name__], "_called", calls := [])
    return calls


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "example.invalid"])
def test_a_call_is_seen(called, host):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, 443), timeout=0.1)
    assert len(called) == 1


def test_this_machine_may_be_called(called):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    assert called == []


RUN = "-o rounds=1 -o engine.workers=1 -o federation.clients_per_round=2 --sweep model.method=fedpara".split()


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["doctor"],
        ["count-params", "vgg16", "--method", "fedpara", "--gamma", "0.1,0.5"],
        pytest.param(["fl", "run", "--out", "run", *RUN], marks=pytest.mark.slow),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_command_calls_nobody(lowrank, called, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert lowrank(*command).code == 0
    assert called == []


def test_flower_calls_nobody_either(monkeypatch):
    """Its telemetry and its look for updates, here and in the programs of it that are started."""
    for name in (names := {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}):
        monkeypatch.delenv(name, raising=False)
    assert names.items() <= environment(Path("home")).items()
    importlib.reload(lowrank_fl.flower)
    assert names.items() <= os.environ.items()
