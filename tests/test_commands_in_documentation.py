"""The documentation's commands: all of them are understood, and those in `sh` blocks run, one page after the other."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = [page for page in PAGES if "```sh\n" in page.read_text(encoding="utf-8")]
SHORTER = {
    ("fl", "run"): ["-o", "rounds=1", "-o", "engine.workers=1", "-o", "data.max_examples=300"],
    ("diffusion", "train"): ["-o", "train.steps=2", "-o", "sample.steps=2"],
}
"""What makes a command short enough for a test."""


def commands(text: str) -> list[list[str]]:
    """The arguments of `lowrank` on each line that begins with it, by itself or behind `uv run`."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [re.match(r"(?:pip install uv && )?(?:uv run )?lowrank ([^#|&]*)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_command_is_understood(page):
    from lowrank_cli.main import app

    root = typer.main.get_command(app)
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    for arguments in (line for kind, text in blocks if kind in ("", "sh") for line in commands(text)):
        command: click.Command = root
        given = [argument for argument in arguments if argument != "..."]
        if "|" in " ".join(given) or "[" in given[-1]:
            continue  # a form that stands for several
        context = click.Context(root)
        while isinstance(command, click.Group):
            command = command.get_command(context, given.pop(0))
            assert command is not None, arguments
        try:
            command.make_context("lowrank", given, resilient_parsing=False)
        except click.exceptions.Exit:
            pass  # --help and --version print and leave


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN, ids=names)
def test_the_commands_that_a_page_asks_to_type_run_in_its_order(page, tmp_path, monkeypatch):
    from lowrank_cli.main import main

    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        kind, body = block.groups()
        if kind == "sh":
            for arguments in commands(body):
                extra = [] if "--resume" in arguments else SHORTER.get(tuple(arguments[:2]), [])
                extra = ["--steps", "2"] if "--prompt" in arguments else extra
                with pytest.raises(SystemExit) as ended:
                    main([*arguments, *extra])
                assert not ended.value.code, arguments
        elif kind == "python":
            exec(compile(body, str(page), "exec"), {})
        elif kind == "yaml" and (name := re.search(r"`([\w-]+\.yaml)`:\s*$", text[: block.start()])):
            Path(name[1]).write_text(body)
