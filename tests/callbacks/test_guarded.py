"""Whatever fails in a hook of a monitor, training goes on as without it."""

import models
import pytest
import torch

from lightning_qk import (
    AttentionMonitor,
    AttentionProbes,
    HiddenStateMonitor,
    PositionMonitor,
    QKSpectrumMonitor,
    SinkMonitor,
    TokenMonitor,
)
from lightning_qk.callbacks._guarded import HOOKS

KINDS = [
    QKSpectrumMonitor,
    AttentionMonitor,
    HiddenStateMonitor,
    TokenMonitor,
    *(pytest.param(one, marks=pytest.mark.slow) for one in (PositionMonitor, SinkMonitor, AttentionProbes)),
]


def losses(callbacks) -> list[torch.Tensor]:
    torch.manual_seed(1)
    job = models.Job()
    models.trainer(callbacks, max_steps=2, limit_val_batches=1).fit(job, models.tokens(8), models.tokens(4))
    return job.losses


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_may_fail(kind):
    want = losses([])
    for hook in sorted(name for name in HOOKS if name in {n for k in kind.__mro__[:-2] for n in vars(k)}):

        def fails(self, *args, **kwargs):
            raise RuntimeError("injected")

        broken = type("Broken", (kind,), {hook: fails})()
        got = losses([broken])
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), hook
        assert not any(
            "injected" in note and "training goes on" not in note
            for note in broken.notes
            if "history" not in note
        )


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_process_passes(error):
    class Broken(QKSpectrumMonitor):
        def on_train_batch_end(self, *args, **kwargs):
            raise error

    with pytest.raises(SystemExit):
        losses([Broken()])
