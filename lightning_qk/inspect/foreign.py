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
        "consolidated.*.pth",
        "weights as Meta publishes them",
        "run src/transformers/models/llama/convert_llama_weights_to_hf.py of transformers' repository on it",
    ),
)


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
