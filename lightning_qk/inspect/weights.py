"""The weights of one checkpoint, by the names of the model's parameters."""

from collections.abc import Callable, Collection, Iterator
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

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the checkpoint has of a parameter, of which nothing is read; None where it tells none."""

    def check_depth(self, layers: Collection[str]) -> None:
        """Refuse a checkpoint that lacks some of a model's attention layers wholly; see :class:`Matching`."""

    def notes(self, layers: Collection[str]) -> list[str]:
        """What a reader has to know of tensors that were not read, given the names of the attention layers.

        It is asked for after the layers were read.
        """


class StoredWeights:
    """Weights as files hold them."""

    def __init__(
        self,
        storage: Storage,
        model: nn.Module,
        *,
        within: bool | None = False,
        prefix: str | None = None,
    ) -> None:
        """Match a checkpoint's tensors with a skeleton's parameters; see :class:`Matching`.

        Raises:
            BadInput: the checkpoint holds nothing of the model.
        """
        self._storage = storage
        self._matching = Matching(model, storage.files, storage.where, within=within, prefix=prefix)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a parameter."""
        return self._matching.has(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the checkpoint has of a parameter, of which nothing is read; None where it tells none."""
        return self._matching.shape(name, self._storage.shape)

    def check_depth(self, layers: Collection[str]) -> None:
        """Refuse a checkpoint that lacks some of a model's attention layers wholly."""
        self._matching.check_depth(layers)

    def notes(self, layers: Collection[str]) -> list[str]:
        """What a reader has to know of tensors that were not read."""
        return self._matching.notes(layers)

    @contextmanager
    def reading(self) -> Iterator[Load]:
        """Within this block weights can be read; files are closed at its end."""
        with self._storage.reading() as get:
            yield lambda names, shape: self._matching.load(names, get, shape)
