"""What a monitor draws: figures while the run goes on."""

from functools import partial
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._guarded import MOST_FAILURES
from lightning_qk.callbacks.monitors._watching import Watching
from lightning_qk.loggers.loggers import shows_pictures
from lightning_qk.loggers.pictures import Pictures
from lightning_qk.record.history import History


class Drawing(Watching):
    """The part of a monitor that draws figures."""

    live: ClassVar[tuple[str, ...]] = ("_pictures",)

    figures_every: int
    figure_statistics: tuple[str, ...]

    def begin(self) -> None:
        """Nothing was drawn yet."""
        super().begin()
        self._pictures = Pictures()
        self._is_finished = False
        self._drawn: int | None = None

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
        """Last figures of a fit; the report comes when all monitors have them."""
        if not trainer.is_global_zero or self._is_finished or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._is_finished = True
        if self.figures_every and len(self.history):
            self.attempt(lambda: self.log_figures(trainer, self.history.steps[-1]), "drawing")
        self.log_late(trainer)


def _draw_heatmap(history: History, statistic: str) -> bytes:
    from lightning_qk.report.figures import heatmap, to_png

    return to_png(heatmap(history, statistic))
