"""Scalars, figures, histograms and settings to the trainer's loggers: all that knows a Lightning logger.

Everything here runs on global rank zero and does nothing on the others. A logger that fails never stops the
training: the first failure of a logger is warned about, and after three in a row it is left alone, since a
logger that cannot reach its server may wait a minute each time.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from lightning_qk._packages import is_lightning
from lightning_qk.record.statistics import STATISTICS

if TYPE_CHECKING:
    import numpy as np
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger
    from numpy.typing import ArrayLike

WANDB_STEP = "trainer/global_step"
WANDB_SECTIONS = tuple(dict.fromkeys(f"{one.group}/*" for one in STATISTICS.values()))
# W&B refuses more than 512 bins and draws 64 by default: 64 are a few kilobytes, of the megabyte that it advises
# for a value.
MAX_BINS = 64
_MAX_FAILURES = 3
_KINDS = {
    "WandbLogger": "wandb",
    "TensorBoardLogger": "tensorboard",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet",
}

_failures: "WeakKeyDictionary[Logger, int]" = WeakKeyDictionary()
_defined: "WeakSet[Any]" = WeakSet()
_summarized: "WeakKeyDictionary[Any, set[str]]" = WeakKeyDictionary()
_informed: "WeakSet[Any]" = WeakSet()
_settings: "WeakKeyDictionary[Logger, dict[str, Any]]" = WeakKeyDictionary()


def log_scalars(trainer: "Trainer", values: Mapping[str, float], step: int) -> None:
    """Log numbers to every logger, all in one row.

    Non-finite numbers are left out: some backends refuse them and others draw them as zero, while a gap in a
    curve cannot be taken for a value.

    Args:
        trainer: the trainer.
        values: key → number.
        step: the optimizer step, as Lightning's own rows have it.
    """
    finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
    if not finite:
        return

    def send(logger: "Logger") -> None:
        if _kind(logger) == "wandb":
            _define_wandb_summaries(logger, finite)
        logger.log_metrics(finite, step=step)

    _to_each(trainer, "scalars", send)


def shows_pictures(trainer: "Trainer") -> bool:
    """Whether a logger of this process takes images, so that they need not be drawn where none does."""
    return trainer.is_global_zero and any(_kind(logger) is not None for logger in trainer.loggers)


def log_png(trainer: "Trainer", key: str, png: bytes, step: int) -> None:
    """Show a picture in the loggers that take images, and leave the others alone.

    Args:
        trainer: the trainer.
        key: the log key.
        png: the picture.
        step: the optimizer step.
    """

    def send(logger: "Logger") -> None:
        kind = _kind(logger)
        if kind == "wandb":
            logger.log_image(key, [_image(png)], step=step)  # type: ignore[attr-defined]
        elif kind == "mlflow":
            name = f"{key}/step_{step:08d}.png"
            logger.experiment.log_image(logger.run_id, _image(png), artifact_file=name)  # type: ignore[attr-defined]
        elif kind == "comet":
            name = _comet_name(logger, key)
            logger.experiment.log_image(_image(png), name=name, step=step)  # type: ignore[attr-defined]
        elif kind == "trackio":
            import trackio

            logger.log_metrics({key: trackio.Image(_image(png))}, step=step)
        elif kind == "tensorboard":
            import numpy as np

            # Not add_figure, which imports pyplot and would render the figure a second time.
            logger.experiment.add_image(key, np.asarray(_image(png)), step, dataformats="HWC")  # type: ignore[attr-defined]

    _to_each(trainer, key, send)


def log_histogram(trainer: "Trainer", key: str, values: "ArrayLike", step: int) -> None:
    """Log how values are distributed to W&B, TensorBoard, Comet and Trackio. Others get nothing.

    Args:
        trainer: the trainer.
        key: the log key.
        values: real numbers, any shape; a tensor on the CPU will do. Non-finite ones are left out.
        step: the optimizer step.
    """
    import numpy as np

    finite = np.asarray(values, dtype=np.float64).reshape(-1)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return

    def send(logger: "Logger") -> None:
        kind = _kind(logger)
        if kind in ("wandb", "trackio"):
            histogram = importlib.import_module(kind).Histogram(np_histogram=_binned(finite))
            logger.log_metrics({key: histogram}, step=step)
        elif kind == "tensorboard":
            logger.experiment.add_histogram(key, finite, step)  # type: ignore[attr-defined]
        elif kind == "comet":
            name = _comet_name(logger, key)
            logger.experiment.log_histogram_3d(finite, name=name, step=step)  # type: ignore[attr-defined]

    _to_each(trainer, key, send)


def log_alert(trainer: "Trainer", title: str, text: str) -> bool:
    """Send an alert to W&B or Trackio, which pass it on as their user wishes; others get nothing.

    Args:
        trainer: the trainer.
        title: a few words.
        text: a sentence.

    Returns:
        Whether a logger took it; False on ranks other than the first.
    """
    sent: list[bool] = []

    def send(logger: "Logger") -> None:
        if _kind(logger) in ("wandb", "trackio"):
            logger.experiment.alert(title=title, text=text)  # type: ignore[attr-defined]
            sent.append(True)

    _to_each(trainer, "an alert", send)
    return bool(sent)


def log_file(trainer: "Trainer", path: "str | Path", *, name: str, kind: str, description: str) -> list[str]:
    """Hand a file over to the loggers that keep files: an artifact of W&B, Trackio or MLflow, an asset of Comet.

    W&B's and Trackio's artifact is named after the run, so that runs do not become versions of one another, and a
    run that is resumed adds a version.

    Args:
        trainer: the trainer.
        path: the file, which stays where it is.
        name: name of the artifact, without the run's id.
        kind: type of the artifact.
        description: a sentence on what is in it.

    Returns:
        The names of the loggers that took it; none on ranks other than the first.
    """
    taken: list[str] = []

    def send(logger: "Logger") -> None:
        found = _kind(logger)
        if found in ("wandb", "trackio"):
            library = importlib.import_module(found)
            run = logger.experiment  # type: ignore[attr-defined]
            artifact = library.Artifact(f"{name}-{run.id}", type=kind, description=description)
            artifact.add_file(str(path))
            run.log_artifact(artifact)
        elif found == "comet":
            where = f"lightning_qk/{Path(path).name}"
            logger.experiment.log_asset(str(path), file_name=where)  # type: ignore[attr-defined]
        elif found == "mlflow":
            logger.experiment.log_artifact(logger.run_id, str(path), "lightning_qk")  # type: ignore[attr-defined]
        else:
            return
        taken.append(type(logger).__name__)

    _to_each(trainer, f"the file {name}", send)
    return taken


def describe_config(trainer: "Trainer", settings: Mapping[str, Any]) -> None:
    """Put settings into the run's configuration, each under ``lightning_qk`` and its name.

    W&B gets them in ``config``, such as ``config["lightning_qk"]["QKSpectrumMonitor"]``, TensorBoard and CSV in
    ``hparams.yaml``, the others as hyperparameters, some flattened with ``/`` or ``|``. To be called in
    ``setup``, before Lightning writes its own hyperparameters.

    Args:
        trainer: the trainer.
        settings: name → plain values, mappings or sequences of them. Anything else is written as text.
    """
    given = {name: plain(value) for name, value in settings.items()}

    def send(logger: "Logger") -> None:
        # What came before goes along: a mapping that is nested replaces the one before it.
        known = _settings.setdefault(logger, {})
        known.update(given)
        if _kind(logger) == "tensorboard":
            # log_hyperparams would start a second entry in the HParams tab. Lightning saves this mapping.
            logger.hparams["lightning_qk"] = dict(known)  # type: ignore[attr-defined]
        else:
            logger.log_hyperparams({"lightning_qk": dict(known)})
        _say_what_is_lacking(logger)

    _to_each(trainer, "settings", send)


def _say_what_is_lacking(logger: "Logger") -> None:
    """Once, of loggers of which we know nothing but Lightning's own methods."""
    name = type(logger).__name__
    if logger in _informed or _kind(logger) is not None or name in ("CSVLogger", "DummyLogger"):
        return
    _informed.add(logger)
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    rank_zero_info(
        f"lightning-qk: {name} gets numbers and settings; pictures and every head are in the run's files"
    )


def _to_each(trainer: "Trainer", what: str, send: "Callable[[Logger], None]") -> None:
    """Call ``send`` with every logger that works."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        failures = _failures.get(logger, 0)
        if failures >= _MAX_FAILURES:
            continue
        try:
            _define_wandb_axes(logger)
            send(logger)
        except Exception as error:
            # Anything may come out of a logger: network, disk, account. None of it is worth the training.
            _failures[logger] = failures + 1
            if failures == 0:
                _warn(logger, what, error)
        else:
            _failures.pop(logger, None)


def _warn(logger: "Logger", what: str, error: Exception) -> None:
    import warnings

    name = type(logger).__name__
    reason = " ".join(str(error).split()) or type(error).__name__
    if _kind(logger) == "wandb":
        mend = "run `wandb login`, or pass WandbLogger(offline=True) and `wandb sync` later"
    else:
        mend = f"check the settings of {name} and that its folder or server can be written to"
    warnings.warn(
        f"{name} could not log {what} ({reason[:200]}); training goes on without it: {mend}",
        RuntimeWarning,
        stacklevel=4,
    )


def _kind(logger: "Logger") -> str | None:
    """Which of the loggers with pictures it is, of either of Lightning's packages, or our own."""
    homes = {f"{base.__module__}.{base.__name__}" for base in type(logger).__mro__}
    if "lightning_qk.loggers.trackio.TrackioLogger" in homes:
        return "trackio"
    return next((kind for name, kind in _KINDS.items() if is_lightning(logger, name)), None)


def _define_wandb_axes(logger: "Logger") -> None:
    """Draw our sections over the optimizer step.

    WandbLogger does so for every key of a run that it has started, but not for one that it was handed. W&B's
    own step, which counts rows, is never passed: rows of different steps would be dropped.
    """
    if _kind(logger) != "wandb":
        return
    run = logger.experiment  # type: ignore[attr-defined]
    if run in _defined:
        return
    # A run that mirrors TensorBoard has that one's step.
    settings = getattr(run, "settings", None)
    if not getattr(settings, "sync_tensorboard", None):
        run.define_metric(WANDB_STEP)
        for section in WANDB_SECTIONS:
            run.define_metric(_with_prefix(logger, section), step_metric=WANDB_STEP, step_sync=True)
    _defined.add(run)


def _define_wandb_summaries(logger: "Logger", keys: "Iterable[str]") -> None:
    """Keep the largest of maxima and the smallest of minima in the run's summary, beside the newest.

    A run that recovered from logits of 10,000 should not look like one that never had them. W&B takes any of the
    globs that match a key, WandbLogger's own ``*`` among them, so that a summary needs the key's whole name.
    """
    run = logger.experiment  # type: ignore[attr-defined]
    done = _summarized.setdefault(run, set())
    new = [key for key in keys if key not in done]
    if not new:
        return
    is_mirror = bool(getattr(getattr(run, "settings", None), "sync_tensorboard", None))
    axis = {} if is_mirror else {"step_metric": WANDB_STEP, "step_sync": True}
    for key in new:
        done.add(key)
        # A whole key in the registry is a number of the run; others end with their reduction.
        of_run = STATISTICS.get(key)
        extreme = of_run.extremes[0] if of_run and of_run.extremes else key.rsplit("/", 1)[-1]
        if extreme in ("min", "max"):
            run.define_metric(_with_prefix(logger, key), summary=f"{extreme},last", **axis)


def _comet_name(logger: "Logger", key: str) -> str:
    """The key as Comet has it."""
    prefix = getattr(logger, "_prefix", None)
    return f"{prefix}_{key}" if prefix else key


def _with_prefix(logger: "Logger", key: str) -> str:
    """The key as W&B has it."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}{key}" if prefix else key  # type: ignore[attr-defined]


def _image(png: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def _binned(values: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
    import numpy as np

    low, high = float(values.min()), float(values.max())
    # numpy refuses bins that floating point cannot tell apart.
    distinct = (high - low) > 1e-9 * max(abs(low), abs(high))
    return np.histogram(values, bins=MAX_BINS if distinct else 1)


def plain(value: Any) -> Any:
    """A value as settings have it: plain ones, in mappings and lists; anything else is written as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)
