"""What help says, and that it is cheap."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version

import click
import pytest
import typer

from lowrank_cli.main import app

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
def test_examples_are_understood(lowrank, command):
    _, *arguments = shlex.split(lowrank(*command, "--help").out.splitlines()[-1].partition("Example: ")[2])
    group = typer.main.get_command(app)
    while isinstance(group, click.Group):
        group = group.get_command(click.Context(group), arguments.pop(0))
    assert group.make_context("lowrank", arguments).params


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_cut_off_in_80_columns(lowrank, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    lines = lowrank(*command, "--help").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage")]


@pytest.mark.parametrize("option", ["--json", "--quiet", "--device", "--override"])
def test_an_option_of_several_commands_is_the_same_in_all(option):
    root = typer.main.get_command(app)
    commands = [each for group in (root, *root.commands.values()) for each in getattr(group, "commands", {}).values()]
    found = [one for command in commands for one in command.params if option in one.opts]
    assert len(found) > 2
    assert len({(one.help, one.metavar, one.rich_help_panel, *one.opts) for one in found}) == 1


def test_the_usage_tells_what_may_be_left_out(lowrank):
    assert lowrank("convert", "--help").out.startswith("Usage: lowrank convert [OPTIONS] SOURCE DEST\n")
    assert lowrank("fl", "run", "--help").out.startswith("Usage: lowrank fl run [OPTIONS] [CONFIG]\n")


@pytest.mark.parametrize(
    ("words", "completions"),
    [("lowrank di", ["diffusion"]), ("lowrank diffusion p", ["push", "presets"]), ("lowrank fl run --se", ["--seed"])],
)
def test_completion(words, completions):
    asked = {"_LOWRANK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == completions
    assert not HEAVY & set(json.loads(done.stderr))


def test_the_script_for_completion_is_bashs(lowrank, monkeypatch):
    monkeypatch.setenv("_LOWRANK_COMPLETE", "source_bash")
    assert "complete -o default -F _lowrank_completion lowrank\n" in lowrank().out


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
