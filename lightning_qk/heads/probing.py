"""Run a module's own forward on a copy whose children are replaced, to see what it does with its inputs.

Neither the model nor its hooks nor its children take part: the copy shares the module's attributes and has
children of its own.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Stop(Exception):
    """Raised by a stand-in to end the run."""


class Through(nn.Module):
    """Stands for a child that is of no interest: gives its input back."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        return x


def run_copy(
    module: nn.Module, children: Mapping[str, nn.Module | None], given: Tensor, **known: Any
) -> None:
    """Call a module's forward on a copy of it.

    Args:
        module: left untouched.
        children: what stands for each of its children.
        given: the first argument.
        known: attributes of the copy (``config``) and arguments by name; other required arguments are None.

    Raises:
        Exception: whatever the forward raises, `Stop` included.
    """
    copy = object.__new__(type(module))
    # Out of training mode, since dropout would draw from the global generator.
    copy.__dict__.update({**module.__dict__, "_modules": dict(children), "training": False})
    if "config" in known:
        copy.__dict__["config"] = known.pop("config")
    forward = type(module).forward
    _, *arguments = inspect.signature(forward).parameters.values()
    required = {
        argument.name: None
        for argument in arguments[1:]
        if argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    }
    with torch.no_grad():
        forward(copy, given, **{**required, **known})
