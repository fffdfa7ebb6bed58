"""What changes weights, in compiled models and under gradient checkpointing, against the same run without."""

import models
import pytest
import torch

from lightning_qk import QKClip, SigmaReparam, UpdateCap


class Prepared(models.Job):
    """A network that is compiled, or recomputes its activations."""

    def __init__(self, how: str) -> None:
        torch.manual_seed(3)
        super().__init__(models.llama(), lr=1e-2)
        network = self.inner["network"]
        if how == "checkpointed":
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self.how = how

    def setup(self, stage: str) -> None:
        if self.how == "compiled":
            self.inner["network"].forward = torch.compile(self.inner["network"].forward)


MAKE = {"clip": lambda: QKClip(0.5), "cap": lambda: UpdateCap(1e-3), "sigma": SigmaReparam}


@pytest.mark.parametrize("how", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MAKE)
def test_a_run_is_the_same(name, how):
    results = []
    for way in ("plain", how):
        module, callback = Prepared(way), MAKE[name]()
        trainer = models.trainer([callback], max_steps=3)
        trainer.fit(module, models.tokens())
        results.append((dict(module.named_parameters()), trainer.callback_metrics))
    (want, metrics), (got, others) = results
    for key, weight in want.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-3, atol=1e-5)
    keys = [key for key in metrics if key.startswith(("clip/", "update_cap/", "sigma_reparam/"))]
    assert keys
    for key in keys:
        assert others[key] == pytest.approx(metrics[key].item(), rel=1e-3)
