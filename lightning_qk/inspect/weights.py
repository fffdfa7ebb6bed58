"""The weights of one checkpoint, by the names of the model's parameters."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_qk.inspect.matching import Matching
from lightning_qk.inspect.storage import Storage

Load = Callable[[list[str], torch.Size], Tensor]
"""The values of a parameter, given all its names and its shape; float32 at least."""


class Weights(Protocol):
    """Weights that are read one parameter at a time."""

    def reading(self) -> AbstractContextManager[Load]:
        """Within this block weights can be read; files are closed at its end."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a parameter."""


class StoredWeights:
    """Weights as files hold them."""

    def __init__(self, storage: Storage, model: nn.Module, *, within: bool = False) -> None:
        """Match a checkpoint's tensors with a skeleton's parameters; see :class:`Matching`.

        Raises:
            BadInput: the checkpoint holds nothing of the model.
        """
        self._storage = storage
        self._matching = Matching(model, storage.files, storage.where, within=within)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a parameter."""
        return self._matching.has(name)

    @contextmanager
    def reading(self) -> Iterator[Load]:
        """Within this block weights can be read; files are closed at its end."""
        with self._storage.reading() as get:
            yield lambda names, shape: self._matching.load(names, get, shape)
