"""The examples run and say what they are there to show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def said(name: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_library():
    printed = said("library.py")
    assert "trained on 0 to 4: 0.0% of 5 to 9" in printed
    assert float(re.search(r"parameters: ([\d.]+)%", printed)[1]) > 90
    assert float(re.search(r"PEFT computes the same from the file, to (\S+)", printed)[1]) < 1e-3


@pytest.mark.filterwarnings("ignore")
def test_use_in_diffusers(tmp_path):
    from lowrank_cli.main import main

    with pytest.raises(SystemExit):
        main(["diffusion", "train", "-o", "train.steps=3", "-o", "train.lr=0.01", "--out", str(tmp_path / "run")])
    printed = said("use_in_diffusers.py", str(tmp_path / "run"))
    apart = [float(found) for found in re.findall(r": (\S+) apart from ours", printed)]
    assert len(apart) == 2
    assert max(apart) < 1e-3
    assert float(re.search(r"by (\S+) on average", printed)[1]) > 0


def test_flower_app():
    pytest.importorskip("ray")
    rounds = [float(found) for found in re.findall(r"round \d: accuracy ([\d.]+)%", said("flower_app.py"))]
    assert len(rounds) == 7
    assert rounds[-1] > 70 > rounds[0]
