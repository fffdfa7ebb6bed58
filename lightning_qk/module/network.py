"""Networks from configs, folders and hub names, fitted to a tokenizer and to labels."""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_qk._printable import listed, one_line

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO_CLASS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
"""Task → class of transformers that opens a folder of such a model."""
_TOKEN_FIELDS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "cls_token_id",
    "sep_token_id",
    "mask_token_id",
)


def _auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, AUTO_CLASS[task])


def make_config(
    fields: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    label_names: Sequence[str] | None = None,
) -> "PreTrainedConfig":
    """A config from its fields, fitted to the data.

    Vocabulary size and special tokens are the tokenizer's unless they are given; the labels are the data's.

    Args:
        fields: ``model_type`` and the fields of that type's config.
        tokenizer: gives the vocabulary size and the special tokens.
        label_names: names of the classes.

    Raises:
        ValueError: no or an unknown ``model_type``, a misspelt field, a value that the config refuses, or a
            vocabulary smaller than the tokenizer's.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    given = dict(fields)
    model_type = given.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"expected model_type among the fields of the model, got {', '.join(given) or 'no fields'}: add "
            "for example model_type: gpt2"
        )
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        raise ValueError(
            f"expected a model_type that transformers has, got {model_type!r}: "
            + (f"did you mean {close[0]!r}?" if close else "correct the spelling")
        )
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    known = {*defaults.to_dict(), *config_class.attribute_map, "num_labels"}
    for name in sorted(set(given) - known):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if close:
            raise ValueError(
                f"expected the fields of a {model_type} config, got {name!r}: did you mean {close[0]!r}?"
            )
        rank_zero_warn(
            f"{name!r} is no field of a {model_type} config that its defaults show; it is passed on as it is"
        )
    if tokenizer is not None:
        size = len(tokenizer)
        if given.get("vocab_size", size) < size:
            raise ValueError(
                f"expected a vocab_size of at least {size}, the tokenizer's, got {given['vocab_size']}: "
                "leave it out, then it is taken from the tokenizer"
            )
        given.setdefault("vocab_size", size)
        for field in _TOKEN_FIELDS:
            # A default of the config points at another vocabulary.
            if hasattr(defaults, field):
                given.setdefault(field, getattr(tokenizer, field))
    if label_names is not None:
        given.pop("num_labels", None)
        given["id2label"] = dict(enumerate(label_names))
        given["label2id"] = {name: index for index, name in enumerate(label_names)}
    try:
        return AutoConfig.for_model(model_type, **given)
    except Exception as error:  # each config checks its fields in its own way
        detail = " ".join(str(error).split())
        raise ValueError(
            f"expected fields that make a {model_type} config, got {detail}: correct them"
        ) from error


def network_from_config(
    config: "PreTrainedConfig", task: str, attn_implementation: str | None = None
) -> "PreTrainedModel":
    """A network with random weights, in the default dtype.

    Args:
        config: as :func:`make_config` returns it.
        task: one of :data:`~lightning_qk.tasks.TASKS`.
        attn_implementation: None is what transformers picks.

    Raises:
        ValueError: the model type does not do this task, or has no such attention.
    """
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        return _auto_class(task).from_config(config, dtype=torch.get_default_dtype(), **options)
    except (ValueError, TypeError, ImportError) as error:
        raise _refused(config.model_type, task, attn_implementation, error) from error


def network_from_pretrained(
    name: str,
    task: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    label_names: Sequence[str] | None = None,
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """A network with pretrained weights, in the default dtype.

    Args:
        name: a folder or a name on the Hugging Face hub.
        task: one of :data:`~lightning_qk.tasks.TASKS`.
        tokenizer: has to fit the network's vocabulary.
        label_names: names of the classes; a head for another number of classes starts from random weights.
        attn_implementation: None is what transformers picks.

    Raises:
        ValueError: no model of that name, it does not do this task, or the tokenizer has more tokens.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # missing files, network, broken JSON: all end in this one line
        raise ValueError(
            "expected a folder with a model, a name on the Hugging Face hub, or the fields of a config as "
            f"model, got {name!r} ({one_line(error)}): correct it, or check the network"
        ) from error
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: index for index, label in enumerate(label_names)}
        options["ignore_mismatched_sizes"] = True
    if tokenizer is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id  # GPT-2 and others have none; a classifier needs it
    try:
        with _without_load_report():
            network, loaded = _auto_class(task).from_pretrained(
                name, config=config, dtype=torch.get_default_dtype(), output_loading_info=True, **options
            )
    except (ValueError, ImportError) as error:
        raise _refused(config.model_type, task, attn_implementation, error) from error
    except RuntimeError as error:
        raise ValueError(
            f"expected weights in {name!r} that fit its config, got other sizes or forms, which the table above "
            "names: correct the config, or save the model again"
        ) from error
    except OSError as error:
        raise ValueError(
            f"expected the weights of a model in {name!r}, got none that can be read ({one_line(error)}): "
            "correct the name, or check the network"
        ) from error
    new = sorted({*loaded["missing_keys"], *(found[0] for found in loaded["mismatched_keys"])})
    if new:
        rank_zero_info(f"lightning-qk: not in {name}, and random unless a checkpoint has them: {listed(new)}")
    size = network.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > size:
        raise ValueError(
            f"expected a tokenizer of at most {size} tokens for the model {name!r}, got one of "
            f"{len(tokenizer)}: pass the model's own as tokenizer"
        )
    return network


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps back transformers' table of tensors without a match, which an error of loading refers to and shows."""
    kept: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return True
        kept.append(record)
        return False

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(keep)
    is_whole = False
    try:
        yield
        is_whole = True
    finally:
        source.removeFilter(keep)
        for record in () if is_whole else kept:
            source.handle(record)


def check_length(network: "PreTrainedModel", length: int) -> None:
    """Make sure that texts are no longer than the network's table of positions.

    Args:
        network: any.
        length: tokens of the longest text.

    Raises:
        ValueError: they are longer.
    """
    positions = getattr(network.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or length <= positions:
        return
    tables = {m.num_embeddings for m in network.modules() if isinstance(m, nn.Embedding)}
    if tables & {positions, positions + 2}:  # OPT and BART have two rows more; rotary models have no table
        raise ValueError(
            f"expected texts of at most {positions} tokens, the model's max_position_embeddings, got "
            f"{length}: lower block_size or max_length, or give a new model more positions"
        )


def config_to_text(config: "PreTrainedConfig") -> str:
    """A config as JSON, to keep in a checkpoint."""
    return json.dumps({**json.loads(config.to_json_string(use_diff=False)), "model_type": config.model_type})


def config_from_text(text: str) -> "PreTrainedConfig":
    """The config that :func:`config_to_text` wrote."""
    from transformers import CONFIG_MAPPING

    fields = json.loads(text)
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def _refused(model_type: str, task: str, attn_implementation: str | None, error: BaseException) -> ValueError:
    if str(error).startswith("Unrecognized configuration class"):
        return ValueError(
            f"expected a model type that transformers has an {AUTO_CLASS[task]} of, got {model_type!r}: "
            "pick another model or another task"
        )
    return ValueError(
        f"expected a {model_type} that can be built for {task} with "
        f"attn_implementation={attn_implementation!r}, got {one_line(error)}: change the one that it names"
    )


def shard_network(network: "PreTrainedModel", mesh: "DeviceMesh") -> None:
    """Shard parameters, gradients and optimizer states with FSDP2, a group for each block of the network.

    Args:
        network: changed in place.
        mesh: of the strategy, with dimensions ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: a tensor parallel size above 1, which needs a plan of the model's own.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"expected tensor_parallel_size=1, got {mesh['tensor_parallel'].size()}: TransformerModule shards "
            "over data parallel processes only (FSDP2); override configure_model to add a tensor parallel plan"
        )
    for block in _blocks(network):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])


def whole_state(network: nn.Module) -> dict[str, Tensor] | None:
    """All weights of a sharded network on the host, on the first process (the others get none).

    A collective call where the network is sharded; None where it is not.
    """
    from torch.distributed.tensor import DTensor

    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def _blocks(network: "PreTrainedModel") -> list[nn.Module]:
    """The modules that transformers itself keeps in one piece, the inner ones before what contains them."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    return [module for module in reversed(list(network.modules())) if type(module).__name__ in names]
