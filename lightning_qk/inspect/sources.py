"""Open what can be inspected: folders, models on the hub, Lightning's checkpoints, adapters, series of them."""

import difflib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_qk.inspect.adapter import AdaptedWeights, check_config
from lightning_qk.inspect.distributed import INDEX, DistributedStorage, extra_of
from lightning_qk.inspect.documents import BadInput, check_counts, one_line, parse_json, read_json
from lightning_qk.inspect.foreign import foreign_format
from lightning_qk.inspect.forms import as_weights
from lightning_qk.inspect.matching import StoredWeights, Weights, listed
from lightning_qk.inspect.quantization import PLAIN, Quantization, quantization_of
from lightning_qk.inspect.storage import (
    Storage,
    folder_storage,
    has_weights,
    load_torch,
    state_dict,
    tensor_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Fetch = Callable[[str], Path | None]

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_TORCH_FILES = (".ckpt", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_STEP = re.compile(r"(?:checkpoint|step|global_step|iter)[-_=]?(\d+)", re.IGNORECASE)
_LARGEST_STEP = 2**53
_MOST_ADAPTERS = 4
"""Adapters on adapters, at most."""
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


@dataclass
class Checkpoint:
    """One set of weights.

    Attributes:
        title: what to call it.
        config: of the model.
        weights: given the skeleton, its weights.
        step: of training, where it is known.
        tokenizer: folder or name on the hub where its tokenizer may be, or None.
        revision: of that.
        notes: sentences that a reader has to know.
        tensors: how many it has.
        size: bytes of its files, None where that is not known.
    """

    title: str
    config: "PreTrainedConfig"
    weights: Callable[[nn.Module], Weights]
    step: int | None = None
    tokenizer: str | None = None
    revision: str | None = None
    notes: list[str] = field(default_factory=list)
    tensors: int | None = None
    size: int | None = None


def open_source(target: str, options: Options) -> list[Checkpoint]:
    """Open a checkpoint or a series of them.

    Args:
        target: a folder that ``save_pretrained`` wrote, a PEFT adapter's folder, a checkpoint of Lightning or
            another file of torch's, a folder of checkpoints, or the name of a model on the hub, with
            ``@revision`` or not.
        options: how.

    Returns:
        The checkpoints by step: one, or as many as a folder of them holds.

    Raises:
        BadInput: it is none of these, or cannot be read.
    """
    path = _place(target)
    try:
        if path.is_file():
            return [_file(path, options)]
        if path.is_dir():
            return _folder(path, options)
    except PermissionError as error:
        raise BadInput(f"expected a path that may be read, got {path}: change its permissions") from error
    name, _, revision = target.partition("@")
    if path.is_absolute() or target.startswith((".", "~")) or not _HUB_ID.match(name):
        raise BadInput(
            f"expected a folder, a checkpoint or the name of a model on the hub, got {target!r}, which does "
            f"not exist{_near(path)}"
        )
    return [_hub(name, revision or options.revision, options)]


def _place(name: str) -> Path:
    """A name as a path.

    Raises:
        BadInput: no path has such a name.
    """
    try:
        path = Path(name).expanduser()
        with suppress(PermissionError):  # reported when it is opened
            path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        shown = name if len(name) <= 100 else f"{name[:100]}…"
        raise BadInput(
            f"expected a path or the name of a model on the hub, got {shown!r} ({one_line(error)}): correct it"
        ) from error
    return path


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return "; correct it"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else "; correct it"


def _folder(path: Path, options: Options) -> list[Checkpoint]:
    fetch = _local(path)
    inside = _checkpoints_in(path)
    if not (options.series and inside):
        if fetch(_ADAPTER) is not None:
            return [_adapter(fetch, str(path), options)]
        if fetch(_CONFIG) is not None and not has_weights(fetch) and not inside:
            other = _other_weights(path, options)
            if other is not None:
                return [other]
        if fetch(_CONFIG) is not None or (options.config is not None and has_weights(fetch)):
            found = _pretrained(fetch, str(path), options)
            if inside:
                found.notes.append(
                    f"{path} also holds {len(inside)} checkpoint{'s' * (len(inside) > 1)}: pass --series to "
                    "read those instead"
                )
            return [found]
    if inside:
        return _series(inside, options)
    other = _other_weights(path, options)
    if other is not None:
        return [other]
    try:
        holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:4]) or "nothing"
    except OSError as error:
        raise BadInput(f"expected a folder that may be read, got {path}: change its permissions") from error
    raise BadInput(
        f"expected a folder with config.json, adapter_config.json or checkpoints, got {path}, which holds "
        f"{holds}: pass the folder that save_pretrained wrote, or a .ckpt file"
    )


def _other_weights(path: Path, options: Options) -> Checkpoint | None:
    """A folder's weights in another format than transformers', or None.

    Raises:
        BadInput: they are in a format that is not read, or there are several files of them.
    """
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise BadInput(
            f"expected one GGUF file in {path}, got {len(files)}: pass one of them "
            f"({listed([file.name for file in files])})"
        )
    if files:
        return _gguf(files[0], options)
    if (path / INDEX).exists() or (path / "meta.pt").exists():
        return _distributed(path, options)
    foreign = foreign_format(path)
    if foreign is not None:
        what, convert = foreign
        raise BadInput(f"expected weights that are read, got {path}, which holds {what}: {convert}")
    return None


def _checkpoints_in(path: Path) -> list[Path]:
    """Checkpoints that lie in a folder: files of Lightning's, or folders that transformers wrote."""
    for folder in (path, path / "checkpoints"):
        if not folder.is_dir():
            continue
        found = [
            entry
            for entry in sorted(folder.iterdir())
            if (entry.suffix == ".ckpt" and (entry.is_file() or (entry / INDEX).is_file()))
            or (entry / _ADAPTER).is_file()
            or ((entry / _CONFIG).is_file() and not _of_something_else(entry / _CONFIG))
        ]
        if found:
            return found
    return []


def _of_something_else(config: Path) -> bool:
    """Whether a config.json belongs to no model, but to a pooling layer of sentence-transformers, say."""
    try:
        fields = read_json(config, "a configuration")
    except BadInput:
        return False  # a damaged one is reported when it is opened
    return not {"model_type", "architectures"} & fields.keys()


def _series(paths: list[Path], options: Options) -> list[Checkpoint]:
    """Checkpoints by step; of several that have one step, the first by name. Damaged ones are left out."""
    numbered = all(_STEP.search(path.name) or path.suffix == ".ckpt" for path in paths)
    opened: dict[int, Checkpoint] = {}
    left_out, damaged = [], {}
    for place, path in enumerate(paths):
        try:
            one = _file(path, options) if path.is_file() else _folder(path, replace(options, series=False))[0]
        except BadInput as error:
            damaged[path.name] = error
            continue
        step = one.step if numbered and one.step is not None else place
        if step in opened:
            left_out.append(path.name)
            continue
        one.step = step
        opened[step] = one
    if not opened:
        raise next(iter(damaged.values()))
    checkpoints = [opened[step] for step in sorted(opened)]
    checkpoints[-1].notes += [f"{name} left out: {error}" for name, error in damaged.items()]
    if left_out:
        checkpoints[-1].notes.append(f"{', '.join(left_out)} left out: of a step that another checkpoint has")
    return checkpoints


def _step_of(path: str) -> int | None:
    found = _STEP.search(Path(path).name)
    return _plausible_step(int(found[1])) if found else None


def _plausible_step(step: Any) -> int | None:
    return (
        step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _LARGEST_STEP else None
    )


def _local(folder: Path) -> Fetch:
    def fetch(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return fetch


def _pretrained(fetch: Fetch, where: str, options: Options, *, hub: str | None = None) -> Checkpoint:
    """A model that transformers saved."""
    given = _named_config(options)
    if given is not None:
        own = read_json(path, "a configuration") if (path := fetch(_CONFIG)) is not None else {}
        said = quantization_of(own or given, where)
        storage = folder_storage(fetch, where, trust=options.trust)
    else:
        # The files bound what a configuration may ask for.
        said = quantization_of(_fields(fetch, where), where)
        try:
            storage = folder_storage(fetch, where, trust=options.trust)
        except BadInput:
            _config(fetch, where, options, hub=hub, tensors=0)  # its own error comes first
            raise
    config = given or _config(fetch, where, options, hub=hub, tensors=len(storage.files))
    if not said.method and any(name.endswith(".qweight") for name in storage.files):
        said = _beside(fetch, where)
    return Checkpoint(
        where,
        config,
        _weights(storage, said, options),
        step=_step_of(where),
        tokenizer=hub or where,
        tensors=len(storage.files),
        size=storage.size(),
    )


def _beside(fetch: Fetch, where: str) -> Quantization:
    """What a file of its own says of GPTQ, as it was kept before transformers knew it."""
    path = fetch("quantize_config.json")
    if path is None:
        return PLAIN
    return quantization_of(
        {"quantization_config": {"quant_method": "gptq", **read_json(path, "a configuration")}}, where
    )


def _weights(
    storage: Storage, quantization: Quantization, options: Options, *, within: bool = False
) -> Callable[[nn.Module], Weights]:
    def weights(model: nn.Module) -> Weights:
        whole = as_weights(storage, quantization, known=model.state_dict().keys())
        return StoredWeights(whole, model, within=within, prefix=options.prefix)

    return weights


def _fields(fetch: Fetch, where: str) -> dict[str, Any]:
    path = fetch(_CONFIG)
    if path is None:
        raise BadInput(
            f"expected a {_CONFIG} in {where}, got none: pass the folder that save_pretrained wrote"
        )
    return read_json(path, "a configuration")


def _config(
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

    fields = _fields(fetch, where)
    path = fetch(_CONFIG)
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


def _adapter(fetch: Fetch, where: str, options: Options) -> Checkpoint:
    """A PEFT adapter with its base."""
    path = fetch(_ADAPTER)
    assert path is not None  # the caller has seen it
    config = read_json(path, "an adapter's configuration")
    check_config(config, where)
    name = options.base or config.get("base_model_name_or_path")
    if not name:
        raise BadInput(f"expected an adapter that names its base, got {where}: pass it with --base")
    if options.base is None and not _place(name).exists() and (path.parent / name).is_dir():
        name = str(path.parent / name)
    here = str(path.parent.resolve())
    if here in options.adapters or len(options.adapters) >= _MOST_ADAPTERS:
        raise BadInput(
            f"expected an adapter on a model, got {where}, whose bases are adapters again "
            f"({' on '.join([*options.adapters, here])}): pass the model with --base"
        )
    try:
        base = open_source(
            name,
            replace(
                options,
                revision=config.get("revision"),
                base=None,
                series=False,
                adapters=(*options.adapters, here),
            ),
        )[-1]
    except BadInput as error:
        if options.base is not None or options.adapters:
            raise
        raise BadInput(
            f"expected the base of the adapter {where}, which is {name}; {error}; or pass --base"
        ) from error
    files = [file for file in ("adapter_model.safetensors", "adapter_model.bin") if fetch(file) is not None]
    if not files:
        raise BadInput(f"expected adapter_model.safetensors in {where}, got none: copy or download it too")
    weights = fetch(files[0])
    assert weights is not None  # it is there
    storage = Storage(
        dict.fromkeys(tensor_names(weights, trust=options.trust), weights), where, trust=options.trust
    )
    return Checkpoint(
        f"{where} on {base.title}",
        base.config,
        lambda model: AdaptedWeights(base.weights(model), model, storage, config, where),
        step=_step_of(where),
        tokenizer=base.tokenizer,
        revision=base.revision,
        notes=list(base.notes),
        tensors=base.tensors,
        size=base.size,
    )


def _file(path: Path, options: Options) -> Checkpoint:
    """A file: of Lightning's, of torch's, or safetensors beside a configuration."""
    if path.suffix == ".safetensors":
        storage = Storage(dict.fromkeys(tensor_names(path), path), str(path))
        config = _named_config(options) or _config(
            _local(path.parent), str(path.parent), options, tensors=len(storage.files)
        )
        return Checkpoint(
            str(path),
            config,
            _weights(storage, quantization_of(config, str(path)), options),
            tokenizer=str(path.parent),
            tensors=len(storage.files),
            size=storage.size(),
        )
    if path.suffix == ".gguf":
        return _gguf(path, options)
    if path.suffix not in _TORCH_FILES:
        raise BadInput(
            f"expected a file that ends with .safetensors, .gguf or {', '.join(_TORCH_FILES)}, got {path}: pass a "
            "checkpoint, or the folder of a model"
        )
    loaded = load_torch(path, trust=options.trust)
    names = list(state_dict(loaded, path))
    if not names:
        raise BadInput(f"expected a checkpoint with a state_dict, got {path}, which holds no tensors by name")
    extra = loaded if isinstance(loaded, Mapping) else {"model": loaded}
    step = _plausible_step(extra.get("global_step"))
    config, tokenizer = _config_of(extra, path, options, len(names))
    del loaded
    storage = Storage(dict.fromkeys(names, path), str(path), trust=options.trust)
    return Checkpoint(
        str(path),
        config,
        _weights(storage, quantization_of(config, str(path)), options, within=True),
        step=_step_of(str(path)) if step is None else step,
        tokenizer=tokenizer,
        tensors=len(names),
        size=storage.size(),
    )


def _distributed(path: Path, options: Options) -> Checkpoint:
    """A folder of shards, as torch.distributed.checkpoint and Lightning write it."""
    storage = DistributedStorage(path)
    extra = extra_of(path, trust=options.trust)
    step = _plausible_step(extra.get("global_step"))
    config, tokenizer = _config_of(extra, path, options, len(storage.files))
    return Checkpoint(
        str(path),
        config,
        _weights(storage, quantization_of(config, str(path)), options),
        step=_step_of(str(path)) if step is None else step,
        tokenizer=tokenizer,
        tensors=len(storage.files),
        size=storage.size(),
    )


def _gguf(path: Path, options: Options) -> Checkpoint:
    """A file of llama.cpp's."""
    from lightning_qk.inspect.gguf_file import GgufFile

    file = GgufFile(path)
    return Checkpoint(
        str(path),
        _named_config(options) or file.config,
        lambda model: StoredWeights(file.storage(model), model, prefix=options.prefix),
        step=_step_of(str(path)),
        tokenizer=str(path),
        notes=["the numbers are those that the GGUF file's codes stand for"] if file.is_quantized else [],
        tensors=file.tensors,
    )


def _config_of(
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
    given = _named_config(options)
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
    if (folder / _CONFIG).is_file():
        return _config(_local(folder), str(folder), options, tensors=tensors), str(folder)
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


def _named_config(options: Options) -> "PreTrainedConfig | None":
    return None if options.config is None else _any_config(options.config, options)


def _any_config(name: str, options: Options) -> "PreTrainedConfig":
    path = _place(name)
    if path.is_file():
        path = path.parent
    if path.is_dir():
        return _config(_local(path), str(path), options)
    if not _HUB_ID.match(name):
        raise BadInput(f"expected a folder or the name of a model on the hub, got {name!r}{_near(path)}")
    return _config(_hub_files(name, options.revision), name, options, hub=name)


def _hub(name: str, revision: str | None, options: Options) -> Checkpoint:
    fetch = _hub_files(name, revision)
    if fetch(_CONFIG) is None and fetch(_ADAPTER) is not None:
        return _adapter(fetch, name, options)
    own = replace(options, revision=revision)
    found = _pretrained(fetch, name, own, hub=name)
    found.revision = revision
    return found


def _hub_files(name: str, revision: str | None) -> Fetch:
    """Files of a model on the hub, from its cache or, where they are not in it, from the network.

    Raises:
        BadInput: neither has the model. A single file that is not there is None.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def cached(file: str) -> Path | None:
        found = try_to_load_from_cache(name, file, revision=revision)
        return Path(found) if isinstance(found, str) else None

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except LocalEntryNotFoundError as error:
            if any(cached(known) for known in (_CONFIG, _ADAPTER)):
                return None
            raise BadInput(
                "expected a path that exists, or a model of the hub that is in its cache or can be "
                f"downloaded, got {name!r}{_near(Path(name))}, or try again with a network and without "
                "HF_HUB_OFFLINE"
            ) from error
        except EntryNotFoundError:
            return None
        except GatedRepoError as error:
            raise BadInput(
                f"expected a model that may be downloaded, got {name!r}, whose owner has to allow it: ask on "
                "its page, then log in with `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise BadInput(f"expected a revision that {name} has, got {revision!r}: correct it") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise BadInput(
                f"expected a path that exists or a model on the hub, got {name!r}: correct it, or log in "
                "with `hf auth login` where it is private"
            ) from error
        except PermissionError as error:
            raise BadInput(
                f"expected a cache that may be written, got {error.filename}: change HF_HOME"
            ) from error
        except Exception as error:  # whatever the network's library raises
            found = cached(file)
            if found is not None:
                return found
            raise BadInput(
                f"expected to reach the hub for {name!r}, got {one_line(error)}: try again later"
            ) from error

    return fetch
