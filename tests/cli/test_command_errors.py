"""How commands end that cannot do what was asked."""

import subprocess
import sys

import pytest

from lowrank_cli.main import main
from lowrank_core.errors import LowrankError, UsageError


def raising(error):
    def load_config(*_, **__):
        raise error

    return load_config


@pytest.mark.parametrize(("error", "code"), [(LowrankError, 1), (UsageError, 2)])
def test_an_error_that_can_be_mended_is_one_sentence_on_stderr(lowrank, monkeypatch, error, code):
    monkeypatch.setattr("lowrank_fl.load.load_config", raising(error("no [red]such[/red] thing")))
    outcome = lowrank("fl", "run")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", "error: no [red]such[/red] thing\n")


def test_our_own_faults_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("lowrank_fl.load.load_config", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["fl", "run"])


def test_ctrl_c_outside_a_run_ends_with_130(lowrank, monkeypatch):
    monkeypatch.setattr("lowrank_fl.load.load_config", raising(KeyboardInterrupt()))
    outcome = lowrank("fl", "run")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


WITHOUT_EXTRA = """
import sys
from lowrank_cli.main import main

class NotInstalled:
    @staticmethod
    def find_spec(name, *_):
        if name.startswith(("lowrank_fl", "lowrank_core")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["run", "presets", "partition"])
def test_without_the_extra_a_command_says_how_to_get_it(command):
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA, "fl", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'error: this command is not installed; get it with: pip install "lowrank[fl]"\n'


def test_another_missing_module_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("lowrank_fl.load.load_config", raising(ModuleNotFoundError("no numpy", name="numpy")))
    with pytest.raises(ModuleNotFoundError, match="no numpy"):
        main(["fl", "run"])


def test_an_unknown_command_is_wrong_usage(lowrank):
    outcome = lowrank("fl", "rum")
    assert (outcome.code, outcome.out) == (2, "")
    assert "rum" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quikstart"], "no preset 'quikstart'"),
        (["-o", "rond=3"], "unknown key 'rond' (nearest: rounds)"),
        (["-o", "model.rank=-1"], "model.rank: "),
        (["-o", "model.gamma=2"], "model.gamma: "),
        (["-o", "rounds"], "-o takes key=value, got 'rounds'"),
        (["--sweep", "rounds"], "--sweep takes key=value, got 'rounds'"),
        (["--engine", "rai"], "--engine takes local, ray, superlink, or "),
        (["--seed", "-1"], "seed: "),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_wrong_usage(lowrank, arguments, sentence):
    outcome = lowrank("fl", "run", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert sentence in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
