"""How a checkpoint is opened, and the configuration of the network that it holds."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_qk._printable import one_line
from lightning_qk.inspect.documents import BadInput, check_counts, parse_json, read_json
from lightning_qk.inspect.files import CONFIG, HUB_ID, Fetch, hub_files, local_files, near_hint, path_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Hyperparameters of a LightningModule that may name its model.
_MODEL_HINT = re.compile(r"model|pretrained|backbone|checkpoint", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """How checkpoints are opened.

    Attributes:
        trust: load objects and run code that come with them.
        revision: of models on the hub.
        base: model that an adapter is added to, instead of the one that it names.
        config: folder or name on the hub whose configuration to take for a checkpoint that holds none.
        series: read the checkpoints in a folder even where it holds a model itself.
        prefix: of the tensors' names, where a file holds several networks.
        adapters: folders of the adapters whose base is being opened.
    """

    trust: bool = False
    revision: str | None = None
    base: str | None = None
    config: str | None = None
    series: bool = False
    prefix: str | None = None
    adapters: tuple[str, ...] = ()


def config_fields(fetch: Fetch, where: str) -> dict[str, Any]:
    """What a checkpoint's config.json says.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    path = fetch(CONFIG)
    if path is None:
        raise BadInput(
            f"expected a {CONFIG} in {where}, got none: pass the folder that save_pretrained wrote"
        )
    return read_json(path, "a configuration")


def read_config(
    fetch: Fetch, where: str, options: Options, *, hub: str | None = None, tensors: int = 0
) -> "PreTrainedConfig":
    """A model's configuration.

    Args:
        fetch: gives the files beside it.
        where: what to call their place in messages.
        options: how checkpoints are opened.
        hub: the model's name on the hub, where it is there.
        tensors: how many there are, to refuse a configuration of far more.
    """
    from transformers import AutoConfig

    fields = config_fields(fetch, where)
    path = fetch(CONFIG)
    assert path is not None  # it was read
    check_counts(fields, tensors, str(path))
    if "configuration_files" in fields:
        raise BadInput(
            f"expected one configuration, got {path} with configuration_files, which names others for other "
            "versions of transformers: remove that field"
        )
    # Code that comes with a model on the hub is found by the model's name.
    source, revision = (hub, options.revision) if hub and options.trust else (str(path.parent), None)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=options.trust)
    except Exception as error:  # whatever a configuration's class may raise
        hint = "" if options.trust or "trust_remote_code" not in str(error) else " (--trust allows that)"
        raise BadInput(
            f"expected a configuration that transformers knows, got {path}: {one_line(error)}{hint}"
        ) from error


def config_of(
    loaded: Mapping[str, Any], path: Path, options: Options, tensors: int
) -> "tuple[PreTrainedConfig, str | None]":
    """The configuration of the network in a checkpoint, and where its tokenizer may be."""
    folder = path if path.is_dir() else path.parent
    hyper = loaded.get("hyper_parameters")
    hints = {
        key: value
        for key, value in (hyper.items() if isinstance(hyper, Mapping) else ())
        if isinstance(key, str) and _MODEL_HINT.search(key)
    }
    names = [value for value in hints.values() if isinstance(value, str)]
    given = named_config(options)
    if given is not None:
        return given, options.config
    own = _of_modules(loaded)
    if own is not None:
        return own, str(folder)
    kept = loaded.get("transformer_config")
    if isinstance(kept, str):
        from lightning_qk.module.network import config_from_text

        _check_text(kept, tensors, path)
        try:
            return config_from_text(kept), names[0] if names else None
        except Exception as error:
            raise BadInput(
                f"expected a configuration that transformers knows in {path}, got one that it refuses: "
                f"{one_line(error)}"
            ) from error
    for value in hints.values():
        if isinstance(value, Mapping) and "model_type" in value:
            from lightning_qk.module.network import make_config

            check_counts(value, tensors, f"the hyperparameters of {path}")
            with suppress(ValueError):
                return make_config(value), None
    for name in names:
        with suppress(BadInput):
            return _any_config(name, options), name
    if (folder / CONFIG).is_file():
        return read_config(local_files(folder), str(folder), options, tensors=tensors), str(folder)
    raise BadInput(
        f"expected a checkpoint that says what model it holds, got {path}, whose hyperparameters do not: "
        "pass the folder or the hub's name of a model of the same configuration with --config"
    )


def _of_modules(loaded: Mapping[str, Any]) -> "PreTrainedConfig | None":
    """The configuration of the first model of transformers' that was saved whole, as a module."""
    from transformers import PreTrainedConfig

    for saved in loaded.values():
        for module in saved.modules() if isinstance(saved, nn.Module) else ():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and config.model_type:
                return config
    return None


def _check_text(text: str, tensors: int, path: Path) -> None:
    """Raises BadInput for a configuration that is no JSON object, or asks for more than the checkpoint holds."""
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise BadInput(
            f"expected a configuration as JSON in {path}, got something else ({one_line(error)}): pass the "
            "folder or the hub's name of a model of the same configuration with --config"
        ) from error
    check_counts(fields, tensors, f"the configuration in {path}")


def named_config(options: Options) -> "PreTrainedConfig | None":
    """The configuration that the options name; None where they name none."""
    return None if options.config is None else _any_config(options.config, options)


def _any_config(name: str, options: Options) -> "PreTrainedConfig":
    path = path_of(name)
    if path.is_file():
        path = path.parent
    if path.is_dir():
        return read_config(local_files(path), str(path), options)
    if not HUB_ID.match(name):
        raise BadInput(f"expected a folder or the name of a model on the hub, got {name!r}{near_hint(path)}")
    return read_config(hub_files(name, options.revision), name, options, hub=name)
