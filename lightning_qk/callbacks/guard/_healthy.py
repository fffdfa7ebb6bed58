"""The last healthy checkpoint of a run: written whole or not at all, and known by an identity that it carries."""

import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_qk.callbacks._ranks import FailedTogether, all_agree, from_zero, is_distributed, reason_of
from lightning_qk.callbacks._trainer import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

CHECKPOINT_NAME = "lightning_qk_healthy.ckpt"
SPARE = 2
"""How many replaced checkpoints are kept for the run's own checkpoints that refer to them."""
_STALE_SECONDS = 3600.0
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Identity:
    """Which checkpoint it is; the same in the file and in the state that points to it.

    Attributes:
        run: of the run that wrote it, whatever process resumed it.
        step: the optimizer step that it holds.
        key: of this file alone.
        path: where it was seen last.
    """

    run: str
    step: int
    key: str
    path: str

    @property
    def mark(self) -> str:
        """What the file itself holds, and no other file."""
        return f"lightning-qk-healthy:{self.run}:{self.step}:{self.key}"

    @classmethod
    def from_state(cls, state: Any) -> "Identity | None":
        """The identity that ``asdict`` described; None for anything else."""
        if not isinstance(state, dict) or set(state) != {"run", "step", "key", "path"}:
            return None
        return cls(str(state["run"]), int(state["step"]), str(state["key"]), str(state["path"]))


class HealthyCheckpoint:
    """The newest checkpoint of a run that was healthy: one file (a folder, where the strategy writes shards).

    Damage is done before it shows. So a checkpoint is a candidate at first, in a file of its own, and replaces the
    one before only when everything that was read for a while after it was healthy too.

    Whatever becomes of the files, ranks do the same: rank zero handles them and tells the others what came of it.

    Args:
        readings: how many healthy readings have to follow.
        keeps_replaced: keep a replaced checkpoint that a checkpoint of the run refers to, at most :data:`SPARE`.
    """

    def __init__(self, readings: int, *, keeps_replaced: bool = False) -> None:
        self.readings = readings
        self.keeps_replaced = keeps_replaced
        self._run = ""
        self._folder = ""
        self._current: Identity | None = None
        self._candidate: Identity | None = None
        self._followed = 0
        self._writing: Identity | None = None
        self._referred: list[str] = []

    @property
    def step(self) -> int | None:
        """The optimizer step that it holds; None where there is none."""
        return None if self._current is None else self._current.step

    @property
    def is_waiting(self) -> bool:
        """Whether a candidate is there that has not been confirmed."""
        return self._candidate is not None

    def begin(self, trainer: Trainer, folder: str) -> int | None:
        """Where it goes, the same on every rank; a collective call.

        Returns:
            The step of a checkpoint that the resumed run had, and that is no more: what lies there is another.
        """
        self._folder = folder
        self._run = self._run or from_zero(trainer, uuid.uuid4().hex)
        before = self._current
        found: tuple[Identity | None, Identity | None] = (None, None)
        if trainer.is_global_zero:
            try:
                found = self._look()
                self._sweep()
            except Exception:
                found = (None, None)  # nothing is shown to be the one
        self._current, self._candidate = from_zero(trainer, found)
        return None if before is None or self._current is not None else before.step

    def _look(self) -> tuple[Identity | None, Identity | None]:
        """Both with their present paths. A candidate stays one even if its file is not found."""
        current = self._current and self._found(self._current)
        return current, self._candidate and (self._found(self._candidate) or self._candidate)

    def _found(self, identity: Identity) -> Identity | None:
        folders = dict.fromkeys([os.path.dirname(identity.path), self._folder])
        paths = [Path(identity.path)]
        for folder in filter(None, folders):
            paths += sorted(
                _quietly(lambda folder=folder: list(Path(folder).glob(f"{CHECKPOINT_NAME}*"))) or []
            )
        for path in dict.fromkeys(paths):
            if not path.name.endswith(".partial") and holds(path, identity.mark):
                return replace(identity, path=str(path))
        return None

    def save(self, trainer: Trainer, step: int) -> None:
        """Save the current state as the candidate checkpoint (collective).

        Raises:
            FailedTogether: some rank could not, on all of them. Nothing of it is left.
        """
        identity = Identity(self._run, step, from_zero(trainer, uuid.uuid4().hex), self._path(".new"))
        partial = Path(self._path(f".new.{self._run[:8]}.partial"))
        error: Exception | None = None
        is_whole = False
        self._writing = identity
        try:
            try:
                with _at_once(trainer):
                    trainer.save_checkpoint(partial, weights_only=False)
            except Exception as own:
                error = own
                if is_distributed(trainer):
                    # The others wait at the barrier at the end of save_checkpoint.
                    trainer.strategy.barrier("CollapseGuard")
            finally:
                self._writing = None
            if error is None and trainer.is_global_zero:
                try:
                    self._put(partial, identity)
                except Exception as own:
                    error = own
            is_whole = all_agree(trainer, error is None)
        finally:
            if trainer.is_global_zero and not is_whole:
                _remove(partial)
        if not is_whole:
            raise _failed(error) from error
        self._candidate, self._followed = identity, 0

    def _put(self, partial: Path, identity: Identity) -> None:
        if not holds(partial, identity.mark):
            raise OSError(f"{partial.name} was not written whole")
        if partial.is_file():
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        path = Path(identity.path)
        _remove(path)
        partial.replace(path)

    def confirm(self, trainer: Trainer, at_once: bool = False) -> None:
        """One more healthy reading: after enough of them the candidate is it. Every rank calls it.

        Raises:
            FailedTogether: the file is gone or cannot be put in its place, on all ranks.
        """
        if self._candidate is None:
            return
        self._followed += 1
        if self._followed < self.readings and not at_once:
            return
        candidate, self._candidate = self._candidate, None
        answer: tuple[Identity | None, str] = (None, "")
        if trainer.is_global_zero:
            try:
                answer = self._promoted(candidate), ""
            except Exception as error:
                answer = None, reason_of(error)
        confirmed, reason = from_zero(trainer, answer)
        if confirmed is None:
            raise FailedTogether(reason)
        self._current = confirmed

    def _promoted(self, candidate: Identity) -> Identity:
        found = self._found(candidate)
        if found is None:
            raise FileNotFoundError(f"{os.path.basename(candidate.path)} is gone")
        path = Path(self._path())
        if found.path != self._path(".new"):
            return found  # of an earlier run of it, in a place of its own
        self._make_room(path)
        Path(found.path).replace(path)
        return replace(found, path=str(path))

    def _make_room(self, path: Path) -> None:
        """Keep the replaced checkpoint if a checkpoint of the run refers to it; remove a folder at its path."""
        before = self._current
        if self.keeps_replaced and before is not None and before.key in self._referred:
            if before.path == str(path) and path.exists():
                path.replace(self._path(f".{before.key[:12]}"))
            for old in self._spares()[SPARE:]:
                _remove(old)
        # A file is replaced at once; a folder has to make room.
        if path.is_dir():
            shutil.rmtree(path)

    def _spares(self) -> list[Path]:
        """Replaced checkpoints of this run, the newest first."""
        names = [f"{CHECKPOINT_NAME}.{key[:12]}" for key in self._referred]
        return [path for name in reversed(names) if (path := Path(self._folder, name)).exists()]

    def doubt(self, trainer: Trainer) -> None:
        """A reading that was not healthy: what was not confirmed until now never will be."""
        candidate, self._candidate = self._candidate, None
        is_here = candidate is not None and trainer.is_global_zero and candidate.path == self._path(".new")
        if candidate is not None and is_here and holds(Path(candidate.path), candidate.mark):
            _remove(Path(candidate.path))

    def _path(self, suffix: str = "") -> str:
        return os.path.join(self._folder, CHECKPOINT_NAME + suffix)

    def sweep(self) -> None:
        """Remove what was not written to its end; for the rank that writes."""
        if self._folder:
            self._sweep()

    def _sweep(self) -> None:
        def stale() -> None:
            for path in list(Path(self._folder).glob(f"{CHECKPOINT_NAME}.new.*.partial")):
                is_own = f".{self._run[:8]}." in path.name
                if is_own or time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    _remove(path)

        _quietly(stale)

    def restore(self, trainer: Trainer) -> bool:
        """Take weights and optimizers' states back; every rank calls it. Whether there was one.

        Learning rates and whatever else a schedule may set stay as they are; so do the schedule, the step and the
        data's position.

        Raises:
            FailedTogether: the file is gone, is another or cannot be read, on all ranks; nothing was changed.
        """
        current = self._current
        if current is None:
            return False
        found = from_zero(trainer, self._found(current) if trainer.is_global_zero else None)
        if found is None:
            raise FailedTogether("it is gone, or what lies there is another")
        checkpoint: dict[str, Any] = {}
        error: Exception | None = None
        settings = [
            [{name: value for name, value in group.items() if name != "params"} for group in one.param_groups]
            for one in trainer.optimizers
        ]
        try:
            checkpoint = _load(trainer, found.path)
            _check(trainer, checkpoint)
        except Exception as own:
            error = own
        if not all_agree(trainer, error is None):
            raise _failed(error) from error
        trainer.strategy.load_model_state_dict(checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for optimizer, groups in zip(trainer.optimizers, settings, strict=True):
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                group.update(kept)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Which it is and which waits; in a checkpoint that is written as a candidate, that it is that one."""
        writing = self._writing
        candidate, followed = (writing, 0) if writing else (self._candidate, self._followed)
        if writing is None:
            for one in filter(None, (self._current, candidate)):
                self._refer(one.key)
        return {
            "run": self._run,
            "current": self._current and asdict(self._current),
            "candidate": candidate and asdict(candidate),
            "followed": followed,
            "referred": list(self._referred),
            "this": writing.mark if writing else "",
        }

    def _refer(self, key: str) -> None:
        self._referred = [*(one for one in self._referred if one != key), key][-32:]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know the files of the run that is resumed; :meth:`begin` looks whether they are there.

        A state of older versions has no identity, so that no file can be shown to be the one: it is left.
        """
        self._run = str(state.get("run", ""))
        self._current = Identity.from_state(state.get("current"))
        self._candidate = Identity.from_state(state.get("candidate"))
        self._followed = int(state.get("followed", 0))
        self._referred = [str(key) for key in state.get("referred", ())]
        for one in filter(None, (self._current, self._candidate)):
            self._refer(one.key)


def holds(path: Path, mark: str) -> bool:
    """Whether a checkpoint holds an identity's mark. Nothing in it is executed.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        mark: of the identity.
    """
    try:
        if path.is_dir():
            return any(
                holds(one, mark) for one in path.iterdir() if one.is_file() and one.suffix != ".distcp"
            )
        if not path.is_file():
            return False
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                if file.read(2) == b"PK":
                    return False  # an archive without its end
                file.seek(0)
                return _contains(iter(lambda: file.read(_CHUNK), b""), mark)
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    with archive.open(name) as file:
                        return _contains(iter(lambda: file.read(_CHUNK), b""), mark)
    except (OSError, zipfile.BadZipFile, EOFError):
        pass
    return False


def _contains(chunks: Iterator[bytes], mark: str) -> bool:
    needle, tail = mark.encode(), b""
    for chunk in chunks:
        if needle in tail + chunk:
            return True
        tail = chunk[-len(needle) :]
    return False


def _check(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuse what does not fit before anything is changed; a strategy of shards has loaded it by now."""
    given = checkpoint.get("state_dict")
    is_sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)
    if is_sharded or not isinstance(given, dict):
        return
    own = trainer.strategy.lightning_module_state_dict()
    other = {name: value.shape for name, value in given.items() if isinstance(value, Tensor)}
    if other and {name: value.shape for name, value in own.items() if isinstance(value, Tensor)} != other:
        raise ValueError("the module has other weights than at that step")
    groups = checkpoint.get("optimizer_states", ())
    if len(groups) != len(trainer.optimizers) or any(
        [len(group["params"]) for group in state["param_groups"]]
        != [len(g["params"]) for g in one.param_groups]
        for state, one in zip(groups, trainer.optimizers, strict=True)
        if "param_groups" in state
    ):
        raise ValueError("the optimizers have other parameters than at that step")


@contextmanager
def _at_once(trainer: Trainer) -> Iterator[None]:
    """The file is whole when saving returns, also under a plugin that writes in a thread."""
    own: Any = getattr(trainer.strategy, "checkpoint_io", None)
    inner = getattr(own, "checkpoint_io", None)
    if inner is None or not any(kind.__name__ == "AsyncCheckpointIO" for kind in type(own).__mro__):
        yield
        return
    trainer.strategy.checkpoint_io = inner
    try:
        yield
    finally:
        trainer.strategy.checkpoint_io = own


def _failed(error: Exception | None) -> FailedTogether:
    """What to raise on every rank; None: it failed on another one."""
    return FailedTogether("another process failed" if error is None else reason_of(error))


def _quietly(action: Any) -> Any:
    """What an action on files returns; None where it fails."""
    try:
        return action()
    except OSError:
        return None


def _remove(path: Path) -> None:
    """Whatever is there, where it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        _quietly(lambda: path.unlink(missing_ok=True))


def _load(trainer: Trainer, path: str) -> dict[str, Any]:
    """A checkpoint that this run wrote, whatever is in it."""
    load = trainer.strategy.load_checkpoint
    if "weights_only" in signature(load).parameters:
        return load(path, weights_only=False)
    return load(path)  # older versions of Lightning have no such argument
