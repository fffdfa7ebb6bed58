"""Weights in a GGUF file, which llama.cpp reads: one tensor at a time, dequantized, under transformers' names.

The file is mapped by the package ``gguf``; transformers says how its tensors are named and laid out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qk._printable import one_line
from lightning_qk.inspect.documents import BadInput, check_counts
from lightning_qk.inspect.storage import Get, Storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MOST_NUMBERS = 2**36
"""Numbers of one tensor: a table of 10⁶ words by 2¹⁶ has fewer."""

_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})


class GgufFile:
    """A GGUF file, its header read.

    Attributes:
        path: of it.
        config: of the model that it describes.
        tensors: how many it holds.
        is_quantized: whether some of them are codes of numbers.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            BadInput: the package is missing, the file is damaged, or holds an architecture that transformers does
                not load from GGUF.
        """
        try:
            import gguf
        except ImportError as error:
            raise BadInput(
                f"expected the package gguf to read {path}, got none: pip install 'lightning-qk[gguf]'"
            ) from error
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            load_gguf_checkpoint,
        )

        self.path = path
        try:
            reader = gguf.GGUFReader(str(path))
            self._tensors = {one.name: one for one in reader.tensors}
            if any(int(one.n_elements) > _MOST_NUMBERS for one in self._tensors.values()):
                raise ValueError("one of its tensors is larger than any model's")
            fields = load_gguf_checkpoint(str(path))["config"]
            self.config = _config(fields, len(self._tensors), path)
            named = str(reader.fields["general.architecture"].contents())
            kind = TENSOR_PROCESSORS.get(named, TENSOR_PROCESSORS.get(fields["model_type"], TensorProcessor))
        except BadInput:
            raise
        except Exception as error:  # a damaged file runs into anything
            raise BadInput(
                f"expected a whole GGUF file of a model that transformers loads, got {path} ({one_line(error)}): "
                "download it again, or pass the model that it was made from"
            ) from error
        self._processor = kind(config=fields)
        self.tensors = len(self._tensors)
        self.is_quantized = any(one.tensor_type.name not in _PLAIN for one in self._tensors.values())

    def storage(self, model: nn.Module) -> Storage:
        """Its tensors under the names that a model's parameters have.

        Raises:
            BadInput: transformers cannot say what they are called.
        """
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        try:
            names: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        except Exception as error:  # an architecture or a model that it does not know
            raise BadInput(
                f"expected a GGUF file whose tensors transformers can name, got {self.path} ({one_line(error)}): "
                "pass the model that it was made from"
            ) from error
        known = {name: own for own, name in names.items() if own in self._tensors}
        return _GgufStorage(self, known)

    def shape(self, own: str) -> tuple[int, ...]:
        """The shape of a tensor by its name in the file; GGUF lists the last dimension first."""
        return tuple(int(size) for size in reversed(self._tensors[own].shape.tolist()))

    def read(self, own: str) -> Tensor:
        """The numbers of a tensor by its name in the file, float32 where they were quantized.

        Raises:
            BadInput: the file is cut short, or its kind of quantization is not known.
        """
        import gguf

        stored = self._tensors[own]
        try:
            numbers = gguf.dequantize(stored.data, stored.tensor_type)
            made = self._processor.process(
                weights=numbers, name=own, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
            )
            return torch.tensor(made.weights)
        except Exception as error:  # whatever numpy and the package raise
            raise BadInput(
                f"expected a tensor {own!r} that gguf can dequantize in {self.path}, got one that it cannot "
                f"({one_line(error)}): download the file again, or update gguf"
            ) from error


class _GgufStorage(Storage):
    """The tensors of a GGUF file under a model's names."""

    def __init__(self, file: GgufFile, names: dict[str, str]) -> None:
        super().__init__(dict.fromkeys(names, file.path), str(file.path))
        self._file = file
        self._names = names

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, read from the header."""
        own = self._names.get(name)
        return None if own is None else self._file.shape(own)

    @contextmanager
    def reading(self) -> Iterator[Get]:
        """Within this block tensors can be read."""
        yield lambda name: self._file.read(self._names[name])


def _config(fields: dict[str, Any], tensors: int, path: Path) -> "PreTrainedConfig":
    from transformers import AutoConfig

    check_counts(fields, tensors, str(path))
    config: PreTrainedConfig = AutoConfig.for_model(**fields)
    if not config.architectures:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        config.architectures = [named] if isinstance(named, str) else None
    return config
