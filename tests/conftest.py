"""What tests of every package share."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every command that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests that hold for every device run; default: cpu")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device").startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no CUDA device here; leave the option out")
        # Libraries of GPUs have warnings of their own, as cuDNN about the weights of an LSTM: shown, and no error.
        config.addinivalue_line("filterwarnings", "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With another device than the CPU, the tests that say nothing about devices are left to the CPU."""
    if config.getoption("device") != "cpu":
        asks = {item: "device" in getattr(item, "fixturenames", ()) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not asks[item]])
        items[:] = [item for item in items if asks[item]]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The torch.device that `--device` names, for tests that say themselves what goes there."""
    import torch

    chosen = torch.device(request.config.getoption("device"))
    if chosen.type == "cuda":
        # By default cuDNN rounds float32 to the ten bits of TF32, and may sum in another order each time.
        for part in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            monkeypatch.setattr(part, "fp32_precision", "ieee")
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return chosen


@pytest.fixture
def on_device(device: Any) -> Iterator[Any]:
    """The same, and what the test makes without naming a device (`torch.randn`, `nn.Linear`) is made there."""
    if device.type == "cpu":
        yield device
    else:
        with device:
            yield device


@pytest.fixture
def cuda(device: Any) -> Any:
    """A CUDA device; without `--device cuda` the test is skipped."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device: pytest --device cuda")
    return device


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that some checkouts have beside them; without it the test is skipped."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}")
    return folder
