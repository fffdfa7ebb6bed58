"""What a monitor draws and writes: figures while the run goes on, and the report of all monitors."""

from functools import partial
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._guarded import MOST_FAILURES
from lightning_qk.callbacks._trainer import describe_error
from lightning_qk.callbacks.monitors._live import LivePage
from lightning_qk.callbacks.monitors._report import write_run
from lightning_qk.callbacks.monitors._watching import Watching
from lightning_qk.callbacks.run_directory import run_directory
from lightning_qk.loggers.loggers import shows_pictures
from lightning_qk.loggers.pictures import Pictures
from lightning_qk.record.history import History


class Reporting(Watching):
    """The part of a monitor that draws figures and writes the report.

    The report is that of all monitors of a trainer: the last of them writes it.
    """

    live: ClassVar[tuple[str, ...]] = ("_pictures", "_ended_by", "_page")

    every_n_steps: int | None
    figures_every: int
    figure_statistics: tuple[str, ...]
    report: bool
    report_every: float | None

    def begin(self) -> None:
        """Nothing was drawn yet."""
        super().begin()
        self._pictures = Pictures()
        self._directory: str | None = None
        self._ended_by: BaseException | None = None
        self._page: LivePage | None = None
        self._drawn: int | None = None

    def find_folder(self, trainer: Trainer) -> None:
        """Agree on where the report goes; a collective call."""
        self._directory = run_directory(trainer)

    def folder(self, trainer: Trainer) -> Path:
        """Where the report goes."""
        return Path(self._directory or trainer.default_root_dir)

    def log_figures(self, trainer: Trainer, step: int) -> None:
        """Draw layer × head heatmaps of the newest values, once a step, in a thread."""
        history = self.history
        if step == self._drawn or self._failed.get("drawing", 0) >= MOST_FAILURES:
            return
        if not shows_pictures(trainer):
            return
        self._drawn = step
        for name in self.figure_statistics:
            is_drawn = self.is_logged(name) and name in history.values
            if is_drawn and history.values[name][-1].isfinite().any():
                # Of its own: the history goes on.
                newest = History(history.layers, history.heads)
                newest.append(step, {name: history.values[name][-1]})
                self._pictures.draw(
                    f"{self.group}/heatmap/{name}", step, partial(_draw_heatmap, newest, name)
                )

    def log_late(self, trainer: Trainer, pl_module: LightningModule | None = None) -> None:
        """Log what was begun at earlier steps in a thread; collective calls with a module alone.

        Args:
            trainer: the trainer.
            pl_module: where its ``log`` may be called, on every process.
        """
        self.attempt(lambda: self._pictures.log(trainer), "drawing")

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Last figures, then, from the last of the monitors, the report of all of them."""
        if not trainer.is_global_zero or self._reported or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._reported = True
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, Reporting)]  # type: ignore[attr-defined]
        for page in (monitor._page for monitor in monitors if monitor._page is not None):
            page.close()
        try:
            if self.figures_every and len(self.history):
                self.log_figures(trainer, self.history.steps[-1])
            self.log_late(trainer)
            if self.report and all(monitor._reported for monitor in monitors if monitor.report):
                folder = self.folder(trainer)
                write_run(trainer, pl_module, folder, self.note, self._ended_by)
        except Exception as error:
            self.note(f"the report could not be written ({describe_error(error)})")

    def rewrite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The report of the run up to now: from the monitor that measures most often, the last of several."""
        monitors = [one for one in reversed(trainer.callbacks) if isinstance(one, Reporting) and one.report]  # type: ignore[attr-defined]
        often = min(monitors, key=lambda one: one.every_n_steps or trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self is often and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._page = self._page or LivePage.as_asked(one.report_every for one in monitors)
            self._page.keep(trainer, pl_module, self.folder(trainer))


def _draw_heatmap(history: History, statistic: str) -> bytes:
    from lightning_qk.report.figures import heatmap, to_png

    return to_png(heatmap(history, statistic))
