"""Names of classes, of those included that were derived while the program runs."""

from torch import nn


def is_named(module: nn.Module, name: str) -> bool:
    """Whether a module's class or one of its bases has a name: FSDP2 gives modules a class derived from theirs."""
    return any(base.__name__ == name for base in type(module).__mro__)
