"""Help text in plain letters: rich's would cost more time than all the rest of `--help`."""

from typing import Any

from typer.core import TyperCommand


class SectionedCommand(TyperCommand):
    """A command whose help lists its options under their `rich_help_panel`, though rich does not print it."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            # An argument without a text of its own is in the usage line already.
            if record is not None and record[1]:
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        # `--help` itself comes last, as everywhere.
        for title in sorted(sections, key=lambda title: title == "Options"):
            with formatter.section(title):
                formatter.write_dl(sections[title])
