"""Options of a job that its configs give a meaning: callbacks by their names, and the folder of a run.

Both become one more config, laid over those that are given.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_qk._printable import did_you_mean
from lightning_qk.cli._arguments import init_args
from lightning_qk.cli._configs import resolve_arguments
from lightning_qk.inspect.documents import BadInput

# First parts of the options that are LightningCLI's.
_GROUPS = ("model", "data", "trainer")
_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+")
_DOTTED = re.compile(r"--(?P<name>\w[\w-]*)\.(?P<argument>\w+)(?:=(?P<value>.*))?$", re.DOTALL)
_ADDED = re.compile(r"--trainer\.callbacks\+=?(?P<class_path>[\w.]*)$")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+$", re.IGNORECASE)


def job_arguments(args: Sequence[str]) -> list[str]:
    """The command line as LightningCLI takes it.

    ``--locater.weight 0.01`` sets an argument of a callback of the configs, or of one that is added with
    ``--trainer.callbacks+=``. The name is the class's with underscores (``qk_spectrum`` or
    ``qk_spectrum_monitor`` for QKSpectrumMonitor), or words of it that only one callback has, such as
    ``spectrum``. ``--run_dir DIR`` puts what the run writes into a folder.

    Raises:
        BadInput: no such config, callback or argument, or no value.
    """
    args = resolve_arguments(args)
    job = merged_configs(args)
    rest, run_dir, named = _own_options(args)
    if run_dir is None and not named:
        return rest
    callbacks = _listed(_at(job, "trainer", "callbacks"))
    # The class may be the next word.
    added = [
        (place, match["class_path"] or "".join(rest[place + 1 : place + 2]))
        for place, arg in enumerate(rest)
        if (match := _ADDED.match(arg))
    ]
    classes = [_class_path(one) for one in callbacks] + [path for _, path in added]
    behind: dict[int, list[str]] = {}
    for option, name, argument, value in named:
        index = _callback(option, name, classes)
        _check_argument(option, argument, classes[index])
        if index < len(callbacks):
            entry = _as_mapping(callbacks[index])
            callbacks[index] = entry | {"init_args": {**(entry.get("init_args") or {}), argument: value}}
        else:
            place, path = added[index - len(callbacks)]
            after = place + (0 if rest[place].endswith(path) else 1)
            behind.setdefault(after, []).append(f"--trainer.callbacks.{argument}={json.dumps(value)}")
    overlay: dict[str, Any] = {}
    if any(_callback(option, name, classes) < len(callbacks) for option, name, *_ in named):
        overlay = {"trainer": {"callbacks": callbacks}}
    if run_dir is not None:
        overlay = moved(job, run_dir, callbacks)
    for place in sorted(behind, reverse=True):
        rest[place + 1 : place + 1] = behind[place]
    return _with_config(rest, overlay) if overlay else rest


def merged_configs(args: Sequence[str]) -> dict[str, Any]:
    """The configs of a command line, each laid over those before it, as far as they can be read."""
    import yaml

    job: dict[str, Any] = {}
    for place, arg in enumerate(args):
        given = arg.removeprefix("--config=") if arg.startswith("--config=") else None
        if arg in ("--config", "-c") and place + 1 < len(args):
            given = args[place + 1]
        if given is None:
            continue
        try:
            path = Path(given)
            text = path.read_text(encoding="utf-8") if len(given) < 4096 and path.is_file() else given
            found = yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(found, Mapping):
            job = _laid_over(job, found)
    return job


def moved(job: Mapping[str, Any], run_dir: str, callbacks: list[Any]) -> dict[str, Any]:
    """What a config has to say for a run to write into another folder.

    Loggers write into it. Paths of checkpoints and of the trained model that lie in the folder of the config
    (``trainer.default_root_dir``) keep their places in the new one.

    Args:
        job: the configs.
        run_dir: the folder.
        callbacks: those of the job.
    """
    trainer: dict[str, Any] = {"default_root_dir": run_dir}
    old = _at(job, "trainer", "default_root_dir")
    logger = _at(job, "trainer", "logger")
    if isinstance(logger, Mapping | list | str):
        loggers = [_as_mapping(one) for one in _listed(logger)]
        trainer["logger"] = [
            one | {"init_args": {**(one.get("init_args") or {}), _folder_argument(_class_path(one)): run_dir}}
            for one in loggers
        ]
    entries = []
    for one in callbacks:
        entry = _as_mapping(one)
        own = dict(entry.get("init_args") or {})
        if isinstance(own.get("dirpath"), str):
            own["dirpath"] = _inside(own["dirpath"], old, run_dir)
        entries.append(entry | ({"init_args": own} if own else {}))
    if entries:
        trainer["callbacks"] = entries
    overlay: dict[str, Any] = {"trainer": trainer}
    exported = _at(job, "model", "save_pretrained_to")
    if isinstance(exported, str):
        overlay["model"] = {"save_pretrained_to": _inside(exported, old, run_dir)}
    return overlay


def callback_name(class_path: str) -> str:
    """A callback's name on the command line, such as ``qk_spectrum`` for ``lightning_qk.QKSpectrumMonitor``."""
    name = class_path.rpartition(".")[2]
    words = [word.lower() for word in _WORDS.findall(name)]
    if any(len(word) == 1 for word in words):
        return name.lower()
    return "_".join(words[:-1] if len(words) > 1 and words[-1] == "monitor" else words)


def _own_options(args: Sequence[str]) -> tuple[list[str], str | None, list[tuple[str, str, str, Any]]]:
    """The other options, the run's folder, and for each option of a callback itself, name, argument and value."""
    rest: list[str] = []
    named: list[tuple[str, str, str, Any]] = []
    run_dir = None
    place = 0
    while place < len(args):
        arg = args[place]
        place += 1
        match = _DOTTED.match(arg)
        is_run_dir = arg == "--run_dir" or arg.startswith("--run_dir=")
        # One of LightningCLI's groups, or one that is misspelt, is not a callback.
        if not is_run_dir and (
            match is None or match["name"] in _GROUPS or did_you_mean(match["name"], _GROUPS)
        ):
            rest.append(arg)
            continue
        option, equals, value = arg.partition("=")
        if not equals:
            if place >= len(args) or args[place].startswith("--"):
                raise BadInput(f"expected a value after {option}, got none: write {option}=VALUE")
            value = args[place]
            place += 1
        if is_run_dir:
            if not value:
                raise BadInput("expected a folder after --run_dir, got none: name one")
            run_dir = value
        else:
            assert match is not None
            named.append((option, match["name"], match["argument"], _value(value)))
    return rest, run_dir, named


def _value(text: str) -> Any:
    import yaml

    if _FLOAT.match(text):  # YAML 1.1 takes 1e-3 for text
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _callback(option: str, name: str, classes: Sequence[str]) -> int:
    """Index of the callback that a name means."""
    wanted = _plain(name)
    named = [index for index, path in enumerate(classes) if wanted in _full_names(path)]
    found = named or [index for index, path in enumerate(classes) if wanted in _short_names(path)]
    if len(found) == 1:
        return found[0]
    names = list(dict.fromkeys(callback_name(path) for path in classes))
    if found:
        several = ", ".join(callback_name(classes[index]) for index in found)
        raise BadInput(
            f"expected the name of one callback, got {option}, of which the config has {len(found)} ({several}): "
            "use a whole name, or edit the config"
        )
    own = _own_class(wanted)
    if own is not None:
        hint = f": add it with --trainer.callbacks+=lightning_qk.{own}"
    else:
        hint = did_you_mean(name, [*names, *_GROUPS]) or ": correct it"
    what = f"a callback of the config ({', '.join(names)})" if names else "a config with callbacks"
    raise BadInput(f"expected an option of model, data, trainer or {what}, got {option}{hint}")


def _check_argument(option: str, argument: str, class_path: str) -> None:
    try:
        known = init_args(class_path)
    except (ImportError, AttributeError, ValueError, TypeError):
        return  # LightningCLI says what is wrong with the class
    if argument not in known:
        hint = did_you_mean(argument, known) or ": correct it"
        raise BadInput(f"expected an argument of {class_path} ({', '.join(known)}), got {option}{hint}")


def _own_class(wanted: str) -> str | None:
    """The callback of this package that a name means."""
    from lightning_qk import callbacks

    return next((name for name in callbacks.__all__ if wanted in _full_names(name)), None)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _full_names(class_path: str) -> set[str]:
    return {_plain(class_path.rpartition(".")[2]), _plain(callback_name(class_path))}


def _short_names(class_path: str) -> set[str]:
    words = [word.lower() for word in _WORDS.findall(class_path.rpartition(".")[2])]
    runs = ("".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1))
    return {run for run in runs if len(run) > 3 and run not in ("monitor", "callback")}


def _folder_argument(class_path: str) -> str:
    """How a logger calls its folder."""
    try:
        known = init_args(class_path)
    except (ImportError, AttributeError, ValueError, TypeError):
        return "save_dir"
    return "save_dir" if "save_dir" in known or "dir" not in known else "dir"


def _inside(path: str, old: Any, new: str) -> str:
    """A path in the old folder, moved to the new one; other paths as they are."""
    try:
        return str(Path(new) / Path(path).relative_to(str(old)))
    except ValueError:
        return path


def _with_config(args: list[str], overlay: Mapping[str, Any]) -> list[str]:
    """A config more, behind the others."""
    places = [
        place + (1 if arg in ("--config", "-c") else 0)
        for place, arg in enumerate(args)
        if arg in ("--config", "-c") or arg.startswith("--config=")
    ]
    behind = max(places, default=0) + 1
    return [*args[:behind], f"--config={json.dumps(overlay)}", *args[behind:]]


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for name, value in above.items():
        old = both.get(name)
        both[name] = (
            _laid_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return both


def _at(job: Mapping[str, Any], *keys: str) -> Any:
    found: Any = job
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _as_mapping(entry: Any) -> dict[str, Any]:
    return dict(entry) if isinstance(entry, Mapping) else {"class_path": str(entry)}


def _class_path(entry: Any) -> str:
    return str(entry.get("class_path", "")) if isinstance(entry, Mapping) else str(entry)
