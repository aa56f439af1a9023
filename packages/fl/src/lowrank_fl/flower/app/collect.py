"""The files of a run that is carried out on another machine, from what its ServerApp tells."""

import dataclasses
from pathlib import Path

from lowrank_fl.config import RunConfig
from lowrank_fl.folder import RunFolder, run_name, write_config
from lowrank_fl.load import expand
from lowrank_fl.results import Observer, RoundRow, RunStart, RunSummary


class Collector:
    """Writes config.yaml, metrics.jsonl and summary.json as the run is told, and passes everything on."""

    def __init__(self, config: RunConfig, folder: Path, observer: Observer) -> None:
        self._runs = expand(config)
        self._folder = folder
        self._observer = observer
        self._open: RunFolder | None = None
        if config.sweep:
            write_config(folder, config)

    def note(self, text: str) -> None:
        self._observer.note(text)

    def run_started(self, start: RunStart) -> None:
        config, swept = self._runs[start.index]
        self._open = RunFolder(self._folder / run_name(swept), config)
        # A resumed run is told from its first round on.
        self._open.keep_rounds(0)
        self._observer.run_started(start)

    def round_ended(self, row: RoundRow) -> None:
        assert self._open is not None
        self._open.add_round(row)
        self._observer.round_ended(row)

    def run_ended(self, summary: RunSummary) -> None:
        assert self._open is not None
        home = self.brought_home(summary, self._folder)
        self._open.save_summary(home)
        self._observer.note(f"the model lies on the SuperLink's machine, in {summary.run_dir}")
        self._observer.run_ended(home)

    @staticmethod
    def brought_home(summary: RunSummary, folder: Path) -> RunSummary:
        """The summary with the folder on this machine instead of the ServerApp's."""
        return dataclasses.replace(summary, run_dir=str(folder / run_name(summary.swept)))
