"""Formats that are not read, by the files that show them, and what converts each."""

from contextlib import suppress
from pathlib import Path

# File → what it is, and the command that turns it into what is read; the first that is there counts.
_FOREIGN = (
    (
        "zero_to_fp32.py",
        "a checkpoint of DeepSpeed's, in shards",
        "run `python zero_to_fp32.py . fp32` in it and pass the folder fp32 with --config",
    ),
    (
        "*/*_model_states.pt",
        "a checkpoint of DeepSpeed's, in shards",
        'run `python -c "from lightning.pytorch.utilities.deepspeed import '
        "convert_zero_checkpoint_to_fp32_state_dict as convert; convert('FOLDER', 'FILE.ckpt')\"`",
    ),
    (
        "tf_model.h5",
        "weights of TensorFlow",
        "with `pip install 'transformers<5' tensorflow`, load them by AutoModel.from_pretrained(FOLDER, "
        "from_tf=True) and call its save_pretrained",
    ),
    (
        "flax_model.msgpack",
        "weights of Flax",
        "with `pip install 'transformers<5' flax`, load them by AutoModel.from_pretrained(FOLDER, "
        "from_flax=True) and call its save_pretrained",
    ),
    (
        "qmodel.pt",
        "weights quantized by HQQ",
        "convert them with the lines for HQQ in docs/how-to/read-a-checkpoint.md",
    ),
    (
        "consolidated.*.pth",
        "weights as Meta publishes them",
        "run src/transformers/models/llama/convert_llama_weights_to_hf.py of transformers' repository on it",
    ),
)

_ORIGINAL = "pass the model that it was made from"
# Quantization → what turns its codes into numbers.
_CONVERTED = {
    "compressed-tensors": 'with `pip install compressed-tensors`, run `python -c "from '
    "compressed_tensors.entrypoints.convert import *; convert_checkpoint('FOLDER', 'OUT', "
    "CompressedTensorsDequantizer('FOLDER'))\"` and pass OUT",
    "torchao": "convert it with the lines for torchao in docs/how-to/read-a-checkpoint.md",
}


def instead_of(quantization: str) -> str:
    """What to do with weights that are quantized in a way that is not read.

    Args:
        quantization: ``quant_method`` of a configuration.
    """
    convert = _CONVERTED.get(quantization)
    return f"{_ORIGINAL}, or {convert}" if convert else _ORIGINAL


def foreign_format(folder: Path) -> tuple[str, str] | None:
    """What a folder holds in place of weights that are read.

    Returns:
        What it is, and how to convert it; None where nothing shows it.
    """
    with suppress(OSError):
        for pattern, what, convert in _FOREIGN:
            if next(folder.glob(pattern), None) is not None:
                return what, convert
    return None
