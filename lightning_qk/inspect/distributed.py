"""Weights in a folder that torch.distributed.checkpoint wrote, Lightning's sharded checkpoints among them.

Shards are put together one tensor at a time, in one process. The folder's index is a pickle; it is read by an
unpickler that knows the index's own types and no others.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_qk._printable import one_line
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.storage import Get, Storage, load_torch

INDEX = ".metadata"
_EXTRA = "meta.pt"
_LARGEST_INDEX = 2**28
"""Bytes of an index: that of 10⁵ tensors in a thousand shards each would have fewer."""
_OTHERS = ("optim", "lr_schedulers.", "loops.", "callbacks.")
"""How tensors begin that are no network's."""

_ALLOWED = frozenset(
    {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib", "PureWindowsPath"),
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)


class _IndexUnpickler(pickle.Unpickler):
    """Makes the types of an index, and torch's dtypes; anything else ends it."""

    def find_class(self, module: str, name: str) -> Any:
        """A type of the index.

        Raises:
            UnpicklingError: it is another one.
        """
        # Some versions of pathlib name their classes' module in full.
        plain = "pathlib" if module.startswith("pathlib.") else module
        if (plain, name) in _ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}")


class DistributedStorage(Storage):
    """The tensors of a folder of shards by name, less those of an optimizer."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's index.

        Raises:
            BadInput: it is damaged, too large, or holds other objects than an index has.
        """
        from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

        index = folder / INDEX
        try:
            size = index.stat().st_size
            if size > _LARGEST_INDEX:
                raise ValueError(f"{size} bytes are more than the {_LARGEST_INDEX} that are read")
            with index.open("rb") as file:
                found = _IndexUnpickler(file).load()
            if not isinstance(found, Metadata):
                raise ValueError(f"it holds a {type(found).__name__}")
            tensors = {
                name: one
                for name, one in found.state_dict_metadata.items()
                if isinstance(name, str) and isinstance(one, TensorStorageMetadata)
            }
            names = [name for name in tensors if not name.startswith(_OTHERS)]
            self._found = {name: tuple(map(int, one.size)) for name, one in tensors.items()}
            self._dtypes = {name: one.properties.dtype for name, one in tensors.items()}
            stored = _stored_bytes(found, folder)
        except PermissionError as error:
            raise BadInput(
                f"expected a file that may be read, got {index}: change its permissions"
            ) from error
        except Exception as error:  # a damaged pickle may raise anything
            raise BadInput(
                f"expected the index of a checkpoint in shards, got {index} ({one_line(error)}): save it again, "
                "or turn the folder into one file with `python -m torch.distributed.checkpoint.format_utils "
                "dcp_to_torch FOLDER FILE.pt`"
            ) from error
        for name in names:
            wanted = torch.Size(self._found[name]).numel() * self._dtypes[name].itemsize
            if wanted > 64 * max(stored, 1):
                raise BadInput(
                    f"expected tensors that their files can hold, got {name!r} of shape {self._found[name]} in "
                    f"{folder}: its index is that of another checkpoint"
                )
        super().__init__(dict.fromkeys(names, index), str(folder))
        self._folder = folder

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, as the index has it."""
        return self._found.get(name)

    def size(self) -> int | None:
        """Bytes of all tensors of the network."""
        return sum(torch.Size(self._found[name]).numel() * self._dtypes[name].itemsize for name in self.files)

    @contextmanager
    def reading(self) -> Iterator[Get]:
        """Within this block tensors can be read: each is put together from its shards."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        def get(name: str) -> torch.Tensor:
            whole = torch.empty(self._found[name], dtype=self._dtypes[name])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that one process reads is what is wanted
                    # A reader of its own each time: it keeps the plan of what it read.
                    dcp.load({name: whole}, storage_reader=dcp.FileSystemReader(self._folder), no_dist=True)
            except (Exception, CheckpointException) as error:  # a shard may be missing or damaged
                failed = [one[0] for one in getattr(error, "failures", {}).values()]
                raise BadInput(
                    f"expected whole shards in {self._folder}, got {one_line((failed or [error])[0])} for the "
                    f"tensor {name!r}: copy the folder again"
                ) from error
            return whole

        yield get


def extra_of(folder: Path, *, trust: bool = False) -> Mapping[str, Any]:
    """What Lightning saved beside the shards: hyperparameters, the step; empty where there is nothing.

    Raises:
        BadInput: the file is damaged, or holds more than tensors and plain values.
    """
    path = folder / _EXTRA
    if not path.is_file():
        return {}
    loaded = load_torch(path, trust=trust)
    return loaded if isinstance(loaded, Mapping) else {}


def _stored_bytes(index: Any, folder: Path) -> int:
    """Bytes of all shards that the index names, which may not lie outside of the folder."""
    total = 0
    for name in {str(info.relative_path) for info in index.storage_data.values()}:
        path = folder / name
        if path.resolve().parent != folder.resolve():
            raise ValueError(f"it names the shard {name!r} outside of its folder")
        total += path.stat().st_size
    return total
