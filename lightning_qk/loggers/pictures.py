"""Pictures that are drawn in a thread while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from lightning_qk.loggers.loggers import log_png

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class _Thread:
    """One thread for all monitors, that lives while there is something to draw or to log.

    matplotlib is safe in one thread besides the main one, and drawing is no hurry.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._open = 0

    def submit(self, draw: "Callable[[], bytes]") -> "Future[bytes]":
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="lightning-qk-pictures")
        self._open += 1
        return self._pool.submit(draw)

    def done(self, count: int) -> None:
        self._open -= count
        if self._open == 0 and self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


_thread = _Thread()


class _Picture(NamedTuple):
    key: str
    step: int
    png: "Future[bytes]"


class Pictures:
    """What one monitor draws: a figure takes a tenth of a second, which a short step would notice.

    Loggers are called by the thread that trains, and in the order of steps: a picture is logged under its own
    step, before anything of a later one.
    """

    def __init__(self) -> None:
        self._pending: list[_Picture] = []

    def draw(self, key: str, step: int, draw: Callable[[], bytes]) -> None:
        """Start to draw.

        Args:
            key: the log key.
            step: the optimizer step.
            draw: makes a PNG; must not touch what the training goes on to change.
        """
        self._pending.append(_Picture(key, step, _thread.submit(draw)))

    def log(self, trainer: "Trainer") -> None:
        """Log what was begun; waits for what is not drawn yet.

        Raises:
            Exception: whatever the drawing raised. The others are dropped.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        try:
            for picture in pending:
                log_png(trainer, picture.key, picture.png.result(), picture.step)
        finally:
            _thread.done(len(pending))
