"""Who may open the page, and what stands in the way of serving it."""

import re
import socket
import sys
from pathlib import Path

import pytest

import lowrank_diffusion.infer.serve as module
from lowrank_core import LowrankError, UsageError
from lowrank_diffusion.infer.request import Request


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`serve(host="0.0.0.0", prompts=["a"])` without a studio or a server: what was noted, and the page's address."""
    noted = []
    monkeypatch.setattr(module, "Studio", lambda *given, once: None)
    monkeypatch.setattr(module, "Desk", lambda *given: None)
    monkeypatch.setattr(module, "check_gradio", lambda: None)
    monkeypatch.setattr(module, "run", lambda desk, listener, names, ready: noted.append(names) or ready())

    def serve(host="127.0.0.1", port=0, **given):
        request = Request(**{"adapters": [], "prompts": [], "base": "tiny", "out": tmp_path / "out"} | given)
        module.serve(request, host, port, noted.append, lambda *ready: noted.append(ready))
        return noted

    return serve


def test_this_machine_alone_may_open_the_page(serve, tmp_path):
    names, (address, out) = serve("127.0.0.2")
    assert names == ["localhost", "127.0.0.1", "127.0.0.2"]
    assert re.fullmatch(r"http://127\.0\.0\.2:\d+", address)
    assert out == tmp_path / "out"


def test_others_may_open_it_after_a_warning(serve):
    warning, names, (address, _) = serve("0.0.0.0")
    assert names == ["*"]
    assert re.fullmatch(rf"http://{re.escape(socket.gethostname())}:\d+", address)
    assert warning == "0.0.0.0 is more than this machine: anybody who reaches it can draw here and see every picture"


def test_a_port_that_is_taken(serve):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LowrankError) as caught:
            serve(port=port)
    assert str(caught.value) == (
        f"port {port} of 127.0.0.1 cannot be listened at (Address already in use); choose another with --port, 0 for "
        "any that is free, or another --host"
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"host": "no such host"}, LowrankError, "of no such host cannot be listened at ("),
        ({"port": 65536}, UsageError, "--port must be from 0 to 65535, got 65536"),
        ({"prompts": ["a", "b"]}, UsageError, "the page draws one prompt at a time, and --prompt is given 2 times"),
        ({"base": None}, UsageError, "--serve draws with adapters, or with a base alone; give an adapter, or a --base"),
        ({"steps": 0}, UsageError, "--steps must be at least 1, got 0"),
        ({"out": Path(__file__)}, LowrankError, "is a file; choose a new or empty folder with --out"),
    ],
)
def test_what_cannot_be_served(serve, given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        serve(**given)


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    with pytest.raises(LowrankError, match=re.escape('which is not installed; pip install "lowrank[serve]"')):
        module.check_gradio()
