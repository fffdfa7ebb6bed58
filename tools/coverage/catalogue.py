"""The model types of the installed transformers, and the classes that build them."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def model_types() -> list[str]:
    """Every type that has a configuration, by name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def config(model_type: str) -> Any:
    """The type's default configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()


def classes(model_type: str) -> Iterator[type]:
    """The classes that build the type: those of the automatic classes, the base model first, then others."""
    import transformers
    from transformers.models.auto import modeling_auto

    mappings = sorted(
        name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
    )
    mappings.sort(key=lambda name: name != "MODEL_MAPPING_NAMES")
    seen = set()
    for mapping in mappings:
        names = getattr(modeling_auto, mapping).get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            found = getattr(transformers, name, None)
            if found is not None and found not in seen:
                seen.add(found)
                yield found
    for found in _by_config(model_type):
        if found not in seen:
            yield found


def _by_config(model_type: str) -> list[type]:
    """Models in the files beside the configuration's that take it; the shortest name is the base."""
    from transformers import PreTrainedModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    package = sys.modules[kind.__module__].__package__ or ""
    folder = os.path.dirname(sys.modules[kind.__module__].__file__ or "")
    names = sorted(entry[:-3] for entry in os.listdir(folder) if entry.startswith("modeling_"))
    modules = []
    for name in names:
        with contextlib.suppress(ImportError):
            modules.append(importlib.import_module(f"{package}.{name}"))
    found = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and getattr(value, "config_class", None) is kind
        and not value.__name__.endswith("PreTrainedModel")
    ]
    return sorted(
        found, key=lambda value: (not value.__name__.endswith(("Model", "Encoder")), len(value.__name__))
    )
