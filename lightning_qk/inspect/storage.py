"""Tensors in files, read one at a time: safetensors and torch's own format, in one file or in shards."""

import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk._printable import one_line
from lightning_qk.inspect.documents import BadInput, read_json

Get = Callable[[str], Tensor]
"""The tensor of a name, valid while the files are open."""

# Formats in the order in which transformers prefers them: one file, and the index of several.
_NAMES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# How torch says what it refuses to load.
_REFUSED_KIND = re.compile(r"GLOBAL (\S+) was not an allowed global")
# Keys under which torch files keep the network's tensors; the first that exists counts. Names of other networks
# keep their key as a prefix.
_NETWORKS = ("state_dict", "model_state_dict", "model")
_LARGEST_PICKLE = 2**28
"""Bytes of what torch pickles beside the tensors' values."""
_INTEGERS = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"})
"""Pickle's codes for a whole number."""


class Storage:
    """The tensors of one checkpoint by name, none of which is read before it is asked for.

    Files are opened for the time of a block (:meth:`reading`), so that what was mapped into memory is given back
    at its end: the pages of a mapped file count as the process's memory as long as it is mapped.

    Attributes:
        files: tensor name → the file that holds it.
        where: what to call it in messages.
        decoded: whether weights that were read are kept as codes.
    """

    decoded = False

    def __init__(self, files: Mapping[str, Path], where: str, *, trust: bool = False) -> None:
        self.files: dict[str, Path] = dict(files)
        self.where = where
        self._trust = trust
        self._shapes: dict[Path, dict[str, tuple[int, ...]]] = {}

    def path(self, name: str) -> Path | None:
        """The file of a tensor, None where it is not available; nothing is downloaded."""
        if isinstance(self.files, _Shards):
            return self.files.at_hand(name)
        return self.files[name]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor from its file's header, without reading its values.

        Returns:
            The shape; None where the file is not available, is damaged, or holds no such tensor.
        """
        path = self.path(name)
        if path is None:
            return None
        if path not in self._shapes:
            try:
                self._shapes[path] = _shapes(path, trust=self._trust)
            except BadInput:  # reported when the tensor is read, if it ever is
                self._shapes[path] = {}
        return self._shapes[path].get(name)

    def size(self) -> int | None:
        """Bytes of all files together; None where one of them is not available."""
        paths = {self.path(name) for name in self.files}
        try:
            return (
                sum(path.stat().st_size for path in paths if path is not None) if None not in paths else None
            )
        except OSError:
            return None

    @contextmanager
    def reading(self) -> Iterator[Get]:
        """Within this block tensors can be read."""
        with ExitStack() as stack:
            opened: dict[Path, Get] = {}

            def get(name: str) -> Tensor:
                if name not in self.files:
                    raise BadInput(
                        f"expected the tensor {name!r} in {self.where}, got no such tensor: save it again"
                    )
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
        tensors = state_dict(load_torch(path, trust=trust), path)

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
    return list(state_dict(load_torch(path, trust=trust), path))


def _shapes(path: Path, *, trust: bool) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        with _safetensors(path) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {
        name: tuple(value.shape) for name, value in state_dict(load_torch(path, trust=trust), path).items()
    }


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    _check_readable(path)
    try:
        file = safe_open(str(path), framework="pt")
    except (
        BaseException
    ) as error:  # a damaged file, or one that the system cannot map; or a fault of the library
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
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
    if not trust:
        _check_contents(path)
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


def _check_contents(path: Path) -> None:
    """Refuse a file that would take more memory than it has bytes, before any of it is loaded.

    torch writes zip files without compression, and before torch 1.6 pickles that say how much follows them.

    Raises:
        BadInput: entries are compressed or overlap, or a pickle asks for more than the file holds.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start[:2] == b"PK":
                _check_zip(path, size)
            elif start[:1] == b"\x80":
                file.seek(0)
                for _ in range(5):  # magic number, protocol, system, object, keys of storages
                    _check_pickle(file, size)
    except _TooLarge as error:
        raise BadInput(
            f"expected a checkpoint as torch writes it, got {path}, {error}: load it with torch and save it "
            "again if you know where it comes from"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise _damaged(path, error) from error


class _TooLarge(Exception):
    """Why a file would take more memory than it has bytes."""


def _check_zip(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            total = sum(entry.file_size for entry in entries)
            raise _TooLarge(f"which is compressed ({size} bytes that unpack to {total})")
        if sum(entry.file_size for entry in entries) > size:
            raise _TooLarge("whose parts overlap")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > _LARGEST_PICKLE:
                    raise _TooLarge(f"which pickles {entry.file_size} bytes beside its tensors")
                with archive.open(entry) as file:
                    _check_pickle(file, size)


def _check_pickle(file: Any, size: int) -> None:
    """Refuse a pickle, unloaded, that asks for a storage or an array larger than its file."""
    largest, is_bytes = 0, False
    for code, argument, _ in pickletools.genops(file):
        if code.name in _INTEGERS:
            largest = max(largest, int(argument or 0))
        elif code.name == "MARK":
            largest = 0
        elif code.name == "GLOBAL":
            largest, is_bytes = 0, str(argument).endswith(" bytearray")
        elif code.name == "BINPERSID" and largest > size:
            raise _TooLarge(f"which names a storage of {largest} numbers in {size} bytes")
        elif code.name == "REDUCE" and is_bytes and largest > size:
            raise _TooLarge(f"which makes an array of {largest} bytes out of {size}")


def state_dict(loaded: Any, where: Path) -> dict[str, Tensor]:
    """The tensors of a loaded file by name.

    Those of Lightning's ``state_dict``, or of the dictionary itself, have their own names; those of other networks
    beside them (``ema_state_dict``, or ``student`` and ``teacher`` alone) have the network's key before them.
    A module that was saved whole has its ``state_dict``.

    Raises:
        BadInput: they are one process's part of a sharded model's.
    """
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    if not isinstance(loaded, Mapping):
        return {}
    loaded = {key: one.state_dict() if isinstance(one, nn.Module) else one for key, one in loaded.items()}
    networks = {
        key: inner
        for key, inner in loaded.items()
        if isinstance(key, str) and isinstance(inner, Mapping) and _named_tensors(inner)
    }
    first = next((networks.pop(key) for key in _NETWORKS if key in networks), loaded)
    found = _named_tensors(first)
    for key, inner in networks.items():
        for name, value in _named_tensors(inner).items():
            found.setdefault(f"{key}.{name}", value)
    return {name: _local(name, value, where) for name, value in found.items()}


def _local(name: str, value: Tensor, where: Path) -> Tensor:
    """The tensor itself of a distributed one that one process has whole."""
    placements = getattr(value, "placements", None)
    if placements is None:
        return value
    held: Tensor = value._local_tensor  # type: ignore[attr-defined]
    if held.shape != value.shape or any(one.is_partial() for one in placements):
        raise BadInput(
            f"expected whole tensors, got {where}, in which one of several processes saved its part of a sharded "
            f"model ({name!r}: {tuple(held.shape)} of {tuple(value.shape)}): save the folder that "
            "torch.distributed.checkpoint.save writes, or what get_model_state_dict gives with "
            "StateDictOptions(full_state_dict=True)"
        )
    return held


def _named_tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        name: value for name, value in mapping.items() if isinstance(name, str) and isinstance(value, Tensor)
    }


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
        f"expected weights in {where}, got no {' or '.join(name for pair in _NAMES for name in pair)}: pass "
        "the folder that save_pretrained wrote"
    )


def has_weights(fetch: Callable[[str], Path | None]) -> bool:
    """Whether a folder holds weights under names that transformers gives them."""
    return any(fetch(name) is not None for pair in _NAMES for name in pair)


class _Shards(dict[str, Path]):
    """Shards are fetched when the first tensor of theirs is asked for: others need not be there."""

    def __init__(self, names: Mapping[str, str], fetch: Callable[[str], Path | None], index: Path) -> None:
        super().__init__(dict.fromkeys(names, index))
        self._names, self._fetch, self._index = names, fetch, index
        self._paths: dict[str, Path] = {}

    def at_hand(self, name: str) -> Path | None:
        """The shard of a tensor if it was fetched or is beside the index."""
        shard = self._names[name]
        beside = self._index.parent / shard
        return self._paths.get(shard) or (beside if beside.is_file() else None)

    def __getitem__(self, name: str) -> Path:
        shard = self._names[name]
        if shard not in self._paths:
            path = self._fetch(shard)
            if path is None:
                raise BadInput(
                    f"expected the shard {shard} that {self._index} names for {name!r}, got no such file: "
                    "download or copy it too"
                )
            self._paths[shard] = path
        return self._paths[shard]


def _sharded(index: Path, fetch: Callable[[str], Path | None], where: str, trust: bool) -> Storage:
    names = read_json(index, "an index with a weight_map").get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(value, str) and Path(value).name == value for value in names.values())
    ):
        raise BadInput(
            f"expected an index with a weight_map, got {index}, whose weight_map names no files beside it: "
            "download or save it again"
        )
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
        f"expected the tensor {name!r} in {path}, which cannot be read ({why}): the file is damaged, or its "
        "index belongs to another one"
    )


def _damaged(path: Path, error: BaseException) -> BadInput:
    return BadInput(
        f"expected a whole checkpoint of torch, got {path} ({one_line(error)}): it is cut short or damaged"
    )
