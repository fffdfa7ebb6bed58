"""Open what can be inspected: folders, models on the hub, Lightning's checkpoints, adapters, series of them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_qk._printable import listed
from lightning_qk.inspect.adapter import AdaptedWeights, check_config
from lightning_qk.inspect.configuration import Options, config_fields, config_of, named_config, read_config
from lightning_qk.inspect.distributed import INDEX, DistributedStorage, extra_of
from lightning_qk.inspect.documents import BadInput, read_json
from lightning_qk.inspect.files import (
    ADAPTER,
    CONFIG,
    HUB_ID,
    Fetch,
    hub_files,
    local_files,
    near_hint,
    path_of,
)
from lightning_qk.inspect.foreign import foreign_format
from lightning_qk.inspect.forms import as_weights
from lightning_qk.inspect.matching import StoredWeights, Weights
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

_TORCH_FILES = (".ckpt", ".pt", ".pth", ".bin")
_STEP = re.compile(r"(?:checkpoint|step|global_step|iter)[-_=]?(\d+)", re.IGNORECASE)
_LARGEST_STEP = 2**53
_MOST_ADAPTERS = 4
"""Adapters on adapters, at most."""


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
    path = path_of(target)
    try:
        if path.is_file():
            return [_file(path, options)]
        if path.is_dir():
            return _folder(path, options)
    except PermissionError as error:
        raise BadInput(f"expected a path that may be read, got {path}: change its permissions") from error
    name, _, revision = target.partition("@")
    if path.is_absolute() or target.startswith((".", "~")) or not HUB_ID.match(name):
        raise BadInput(
            f"expected a folder, a checkpoint or the name of a model on the hub, got {target!r}, which does "
            f"not exist{near_hint(path)}"
        )
    return [_hub(name, revision or options.revision, options)]


def _folder(path: Path, options: Options) -> list[Checkpoint]:
    fetch = local_files(path)
    inside = _checkpoints_in(path)
    if not (options.series and inside):
        if fetch(ADAPTER) is not None:
            return [_adapter(fetch, str(path), options)]
        if fetch(CONFIG) is not None and not has_weights(fetch) and not inside:
            other = _other_weights(path, options)
            if other is not None:
                return [other]
        if fetch(CONFIG) is not None or (options.config is not None and has_weights(fetch)):
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
            or (entry / ADAPTER).is_file()
            or ((entry / CONFIG).is_file() and not _of_something_else(entry / CONFIG))
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


def _step_of(path: str, extra: Mapping[str, Any] = MappingProxyType({})) -> int | None:
    """The step that a checkpoint says, or else its name."""
    named = _STEP.search(Path(path).name)
    for step in (extra.get("global_step"), int(named[1]) if named else None):
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _LARGEST_STEP:
            return step
    return None


def _pretrained(fetch: Fetch, where: str, options: Options, *, hub: str | None = None) -> Checkpoint:
    """A model that transformers saved."""
    given = named_config(options)
    if given is not None:
        own = read_json(path, "a configuration") if (path := fetch(CONFIG)) is not None else {}
        said = quantization_of(own or given, where)
        storage = folder_storage(fetch, where, trust=options.trust)
    else:
        # The files bound what a configuration may ask for.
        said = quantization_of(config_fields(fetch, where), where)
        try:
            storage = folder_storage(fetch, where, trust=options.trust)
        except BadInput:
            read_config(fetch, where, options, hub=hub, tensors=0)  # its own error comes first
            raise
    config = given or read_config(fetch, where, options, hub=hub, tensors=len(storage.files))
    if not said.method and any(name.endswith(".qweight") for name in storage.files):
        said = _beside(fetch, where)
    return _stored(storage, config, options, said, step=_step_of(where), tokenizer=hub or where)


def _beside(fetch: Fetch, where: str) -> Quantization:
    """GPTQ settings of ``quantize_config.json``, which older checkpoints have instead of a config field."""
    path = fetch("quantize_config.json")
    if path is None:
        return PLAIN
    return quantization_of(
        {"quantization_config": {"quant_method": "gptq", **read_json(path, "a configuration")}}, where
    )


def _stored(
    storage: Storage,
    config: "PreTrainedConfig",
    options: Options,
    quantization: Quantization | None = None,
    *,
    within: bool = False,
    step: int | None = None,
    tokenizer: str | None,
) -> Checkpoint:
    """A checkpoint of tensors by name; ``within`` as for :class:`StoredWeights`."""
    said = quantization_of(config, storage.where) if quantization is None else quantization

    def weights(model: nn.Module) -> Weights:
        whole = as_weights(storage, said, known=model.state_dict().keys())
        return StoredWeights(whole, model, within=within, prefix=options.prefix)

    return Checkpoint(
        storage.where,
        config,
        weights,
        step=step,
        tokenizer=tokenizer,
        tensors=len(storage.files),
        size=storage.size(),
    )


def _adapter(fetch: Fetch, where: str, options: Options) -> Checkpoint:
    """A PEFT adapter with its base."""
    path = fetch(ADAPTER)
    assert path is not None  # the caller has seen it
    config = read_json(path, "an adapter's configuration")
    check_config(config, where)
    name = options.base or config.get("base_model_name_or_path")
    if not name:
        raise BadInput(f"expected an adapter that names its base, got {where}: pass it with --base")
    if options.base is None and not path_of(name).exists() and (path.parent / name).is_dir():
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
        config = named_config(options) or read_config(
            local_files(path.parent), str(path.parent), options, tensors=len(storage.files)
        )
        return _stored(storage, config, options, tokenizer=str(path.parent))
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
    step = _step_of(str(path), extra)
    config, tokenizer = config_of(extra, path, options, len(names))
    del loaded, extra
    storage = Storage(dict.fromkeys(names, path), str(path), trust=options.trust)
    return _stored(storage, config, options, within=True, step=step, tokenizer=tokenizer)


def _distributed(path: Path, options: Options) -> Checkpoint:
    """A folder of shards, as torch.distributed.checkpoint and Lightning write it."""
    storage = DistributedStorage(path)
    extra = extra_of(path, trust=options.trust)
    config, tokenizer = config_of(extra, path, options, len(storage.files))
    return _stored(storage, config, options, step=_step_of(str(path), extra), tokenizer=tokenizer)


def _gguf(path: Path, options: Options) -> Checkpoint:
    """A file of llama.cpp's."""
    from lightning_qk.inspect.gguf_file import GgufFile

    file = GgufFile(path)
    return Checkpoint(
        str(path),
        named_config(options) or file.config,
        lambda model: StoredWeights(file.storage(model), model, prefix=options.prefix),
        step=_step_of(str(path)),
        tokenizer=str(path),
        notes=["the numbers are those that the GGUF file's codes stand for"] if file.is_quantized else [],
        tensors=file.tensors,
    )


def _hub(name: str, revision: str | None, options: Options) -> Checkpoint:
    fetch = hub_files(name, revision)
    if fetch(CONFIG) is None and fetch(ADAPTER) is not None:
        return _adapter(fetch, name, options)
    own = replace(options, revision=revision)
    found = _pretrained(fetch, name, own, hub=name)
    found.revision = revision
    return found
