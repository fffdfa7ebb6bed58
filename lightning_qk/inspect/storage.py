"""Tensors in files, read one at a time: safetensors and torch's own format, in one file or in shards."""

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qk.inspect.errors import BadInput, one_line

Get = Callable[[str], Tensor]
"""The tensor of a name, valid while the files are open."""

# Formats in the order in which transformers prefers them: one file, and the index of several.
_NAMES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# How torch says what it refuses to load.
_REFUSED_KIND = re.compile(r"GLOBAL (\S+) was not an allowed global")


class Storage:
    """The tensors of one checkpoint by name, none of which is read before it is asked for.

    Files are opened for the time of a block (:meth:`reading`), so that what was mapped into memory is given back
    at its end: the pages of a mapped file count as the process's memory as long as it is mapped.

    Attributes:
        files: tensor name → the file that holds it.
        where: what to call it in messages.
    """

    def __init__(self, files: Mapping[str, Path], where: str, *, trust: bool = False) -> None:
        self.files = dict(files)
        self.where = where
        self._trust = trust

    @contextmanager
    def reading(self) -> Iterator[Get]:
        """Within this block tensors can be read."""
        with ExitStack() as stack:
            opened: dict[Path, Get] = {}

            def get(name: str) -> Tensor:
                path = self.files[name]
                if path not in opened:
                    opened[path] = stack.enter_context(open_tensors(path, trust=self._trust))
                return opened[path](name)

            yield get
            opened.clear()


@contextmanager
def open_tensors(path: Path, *, trust: bool = False) -> Iterator[Get]:
    """Open one file of tensors.

    Raises:
        BadInput: it is missing, cut short, or not what its name says.
    """
    if path.suffix == ".safetensors":
        with _safetensors(path) as file:

            def get(name: str) -> Tensor:
                try:
                    return file.get_tensor(name)
                except Exception as error:  # of the file's library, or of the system's mapping
                    raise _missing(name, path, error) from error

            yield get
    else:
        tensors = state_dict(load_torch(path, trust=trust))

        def lookup(name: str) -> Tensor:
            if name not in tensors:
                raise _missing(name, path, None)
            return tensors[name]

        yield lookup
        del tensors


def tensor_names(path: Path, *, trust: bool = False) -> list[str]:
    """Names of the tensors in a file.

    Raises:
        BadInput: see :func:`open_tensors`.
    """
    if path.suffix == ".safetensors":
        with _safetensors(path) as file:
            return list(file.keys())
    return list(state_dict(load_torch(path, trust=trust)))


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    _check_readable(path)
    try:
        file = safe_open(str(path), framework="pt")
    except Exception as error:  # a damaged file, or one that the system cannot map
        raise BadInput(
            f"expected a whole safetensors file, got {path} ({one_line(error)}): it is cut short or damaged; "
            "download or save it again"
        ) from error
    with file as opened:
        yield opened


def load_torch(path: Path, *, trust: bool = False) -> Any:
    """What torch.save wrote, its tensors mapped into memory and not read.

    Args:
        path: the file.
        trust: load it even where that can run code that it holds.

    Raises:
        BadInput: it is missing, damaged, or holds more than tensors and plain values.
    """
    _check_readable(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format before torch 1.6 cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "weights only" not in text.lower() and "weights_only" not in text:
            raise _damaged(path, error) from error
        kind = _REFUSED_KIND.search(text)
        what = f" of {kind[1]}" if kind else ""
        raise BadInput(
            f"expected a checkpoint of tensors and plain values, got {path}, which holds objects{what} whose "
            "loading can run code: pass --trust if you know where it comes from"
        ) from error
    except Exception as error:  # what loading runs into in a damaged file can be anything
        raise _damaged(path, error) from error


def state_dict(loaded: Any) -> dict[str, Tensor]:
    """The tensors of a loaded file by name: those of Lightning's ``state_dict``, or of the dictionary "
    "itself."""
    if isinstance(loaded, Mapping):
        for key in ("state_dict", "model_state_dict", "model"):
            inner = loaded.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
                loaded = inner
                break
        return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    return {}


def folder_storage(fetch: Callable[[str], Path | None], where: str, *, trust: bool = False) -> Storage:
    """The weights of a folder as transformers writes them.

    Args:
        fetch: gives the path of a file of the folder, None where there is none.
        where: what to call it in messages.
        trust: see :func:`load_torch`.

    Raises:
        BadInput: there are no weights, or an index that cannot be read.
    """
    for whole, index in _NAMES:
        path = fetch(whole)
        if path is not None:
            return Storage(dict.fromkeys(tensor_names(path, trust=trust), path), where, trust=trust)
        listed = fetch(index)
        if listed is not None:
            return _sharded(listed, fetch, where, trust)
    raise BadInput(
        f"expected weights in {where}, got no {' or '.join(name for pair in _NAMES for name in pair)}: "
        "pass the "
        "folder that save_pretrained wrote"
    )


class _Shards(dict[str, Path]):
    """Shards are fetched when the first tensor of theirs is asked for: others need not be there."""

    def __init__(self, names: Mapping[str, str], fetch: Callable[[str], Path | None], index: Path) -> None:
        super().__init__(dict.fromkeys(names, index))
        self._names, self._fetch, self._index = names, fetch, index
        self._paths: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        shard = self._names[name]
        if shard not in self._paths:
            path = self._fetch(shard)
            if path is None:
                raise BadInput(
                    f"expected the shard {shard} that {self._index} names for {name!r}, got no such file: "
                    "download "
                    "or copy it too"
                )
            self._paths[shard] = path
        return self._paths[shard]


def _sharded(index: Path, fetch: Callable[[str], Path | None], where: str, trust: bool) -> Storage:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(value, str) and Path(value).name == value for value in names.values()):
            raise ValueError("its weight_map names no files beside it")
    except PermissionError as error:
        raise BadInput(f"expected a file that may be read, got {index}: change its permissions") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"expected an index with a weight_map, got {index} ({one_line(error)}): download or save it again"
        ) from error
    storage = Storage({}, where, trust=trust)
    storage.files = _Shards(names, fetch, index)
    return storage


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except PermissionError as error:
        raise BadInput(f"expected a file that may be read, got {path}: change its permissions") from error
    except OSError as error:
        raise BadInput(
            f"expected a file, got {path} ({error.strerror or one_line(error)}): correct it"
        ) from error


def _missing(name: str, path: Path, error: BaseException | None) -> BadInput:
    why = "it holds none of that name" if error is None else one_line(error)
    return BadInput(
        f"expected the tensor {name!r} in {path}, which cannot be read ({why}): the file is damaged, or "
        "its index "
        "belongs to another one"
    )


def _damaged(path: Path, error: BaseException) -> BadInput:
    return BadInput(
        f"expected a whole checkpoint of torch, got {path} ({one_line(error)}): it is cut short or damaged"
    )
