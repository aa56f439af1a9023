"""What help says, and that it is cheap."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

FL = [("fl",), *(("fl", command) for command in ("run", "presets", "partition", "report"))]
DIFFUSION = [("diffusion",), *(("diffusion", command) for command in ("train", "presets", "push", "merge", "extract"))]
COMMANDS = [(), *FL, *DIFFUSION, ("convert",), ("count-params",), ("infer",), ("doctor",)]
HEAVY = {"torch", "torchvision", "flwr", "flwr_datasets", "datasets", "diffusers", "peft", "pydantic", "numpy", "rich"}

IMPORTED = """
import json, sys
from lowrank_cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    done = subprocess.run([sys.executable, "-c", IMPORTED, *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert not HEAVY & set(json.loads(done.stderr))


@pytest.mark.parametrize("group", ["fl", "diffusion"])
def test_listing_presets_imports_no_framework(group):
    done = subprocess.run([sys.executable, "-c", IMPORTED, group, "presets"], capture_output=True, text=True)
    assert done.returncode == 0
    assert not {"torch", "torchvision", "flwr", "diffusers", "pydantic"} & set(json.loads(done.stderr))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example(lowrank, command):
    outcome = lowrank(*command, "--help")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].strip().startswith("Example: lowrank")


@pytest.mark.parametrize("command", COMMANDS)
def test_h_is_short_for_help(lowrank, command):
    assert lowrank(*command, "-h") == lowrank(*command, "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(lowrank, command):
    lines = lowrank(*command, "--help").out.splitlines()
    options = [line.split("  ") for line in lines if line.startswith("  -")]
    assert options
    assert all(len(option) > 2 for option in options)


def test_options_stand_in_sections_by_what_they_are_for(lowrank):
    help_text = lowrank("fl", "run", "--help").out
    headings = [line for line in help_text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Configuration:", "Output:", "Options:"]
    assert help_text.index("--seed") < help_text.index("Output:") < help_text.index("--plan")


def test_a_group_without_a_command_shows_its_help(lowrank):
    assert "presets" in lowrank("fl").out + lowrank("fl").err


def test_version_is_that_of_the_package(lowrank):
    first, others = lowrank("--version").out.splitlines()
    assert first == "lowrank 0.1.0"
    assert f"torch {version('torch')}, flwr {version('flwr')}" in others
