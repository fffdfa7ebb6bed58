"""A Lightning logger for Trackio, whose API is that of Weights & Biases, on the own machine."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_qk.loggers.loggers import plain


class TrackioLogger(Logger):
    """Logs to `Trackio <https://huggingface.co/docs/trackio>`_: a local database, or a Space where asked.

    Rows have Lightning's optimizer step as Trackio's own. Hyperparameters that are logged before the first row are
    the run's configuration; Trackio takes none later.

    Args:
        project: the project.
        name: of the run; None has Trackio make one. The run of a name that exists is gone on with.
        save_dir: root of the folders of runs, for checkpoints and reports; the database is where Trackio has it
            (``TRACKIO_DIR``).
        options: passed on to ``trackio.init``, such as ``space_id`` or ``auto_log_gpu``.

    Raises:
        ModuleNotFoundError: Trackio is not installed; when the run begins.
    """

    def __init__(
        self, project: str = "lightning_logs", name: str | None = None, *, save_dir: str = ".", **options: Any
    ) -> None:
        super().__init__()
        self._project, self._run_name, self._save_dir, self._options = project, name, save_dir, options
        self._run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, a ``trackio.Run``; begun at first use."""
        if self._run is None:
            try:
                import trackio
            except ModuleNotFoundError as error:
                if error.name != "trackio":
                    raise
                raise ModuleNotFoundError(
                    "expected the package trackio for TrackioLogger, got none: pip install trackio",
                    name=error.name,
                ) from error
            options = {"embed": False, "resume": "allow", **self._options}
            self._run = trackio.init(project=self._project, name=self._run_name, **options)
            self._run_name = self._run.name
        return self._run

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """Name of the run."""
        if self._run_name is None:
            self.experiment  # noqa: B018 (Trackio names it; on other ranks nothing does)
        return self._run_name

    @property
    def save_dir(self) -> str:
        """Root of the folders of runs."""
        return self._save_dir

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row."""
        row = {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()}
        self.experiment.log(row, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Put hyperparameters into the run's configuration."""
        given = vars(params) if isinstance(params, Namespace) else params
        self.experiment.config.update({str(name): plain(value) for name, value in given.items()})

    def __getstate__(self) -> dict[str, Any]:
        """Without the run, which has threads: a copy resumes it by its name."""
        return {**vars(self), "_run": None}
