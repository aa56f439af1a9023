"""Help text in plain letters: rich's would cost more time than all the rest of `--help`."""

# Click's generics leave Typer's options partly unknown.
# pyright: reportUnknownMemberType=false

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo


class SectionedCommand(TyperCommand):
    """A command whose help lists its options under their `rich_help_panel`, though rich does not print it."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        # An argument that our own sentence asks for is not required in Click's eyes, which would put it in brackets.
        return ["[OPTIONS]", *(str(one.metavar) for one in self.get_params(ctx) if one.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            # An argument is in the usage line already.
            if record is not None and parameter.param_type_name == "option":
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        # `--help` itself comes last, as everywhere.
        for title in sorted(sections, key=lambda title: title == "Options"):
            with formatter.section(title):
                formatter.write_dl(sections[title])


class GroupsFirst(TyperGroup):
    """A group that lists the groups in it before its commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: not isinstance(self.commands[name], TyperGroup))


def option(help: str, panel: str, metavar: str | None = None, *, name: str | None = None) -> OptionInfo:
    """An option under a heading of its command's help, which says its default itself where there is one."""
    names = (name,) if name else ()
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, rich_help_panel=panel)
