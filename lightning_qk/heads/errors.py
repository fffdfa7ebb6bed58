"""Why an attention layer could not be read."""

import weakref

from torch import nn


class UnreadLayer(Exception):
    """One attention layer cannot be read; the message is the reason, as a clause that ends a sentence."""


class InaccessibleWeights(UnreadLayer):
    """The layout is known, but this process cannot reach the values; the message says how to mend it."""


class NotTokenAttention(UnreadLayer):
    """Its products run over the tokens: it attends over channels, so that its softmax is none over tokens."""


def alive(reference: "weakref.ref[nn.Module]") -> nn.Module:
    """The module that a plan refers to weakly.

    Raises:
        RuntimeError: it is gone.
    """
    module = reference()
    if module is None:
        raise RuntimeError(
            "expected the modules of the model that was read first, got one that is gone: keep a reference to the "
            "model, and call refresh() on the reader after replacing modules"
        )
    return module
