"""What fails at some calls, in one of two processes."""

from unittest import mock

import torch


class Failing:
    """Fails at every call, or at some of them, in place of what is there."""

    def __init__(self, calls: range) -> None:
        self.calls, self.count = calls, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count in self.calls:
            raise torch.linalg.LinAlgError("injected") if self.count % 2 else OSError(28, "injected")
        return self.real(*args, **kwargs)

    def at(self, owner: object, name: str):
        self.real = getattr(owner, name)
        # A function is bound to its instance, an object is not.
        return mock.patch.object(owner, name, lambda *args, **kwargs: self(*args, **kwargs))
