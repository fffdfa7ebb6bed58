"""Baselines that LocAteR is compared with, against independent oracles; what is measured; the quick run."""

import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from baselines import (
    EntropyReward,
    PenalizedModule,
    QKWeightDecay,
    SigmaReparam,
    add_sigma_reparam,
    normalized_entropy,
    register_entropy_attention,
)
from common import read
from locater import Runs, cache_key, cached_train, choose, main
from material import digits
from settings import configuration
from torch import Tensor
from torch.utils.data import DataLoader
from train import token_similarity
from transformers import AutoConfig, AutoModelForCausalLM

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "paper"
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 32}
OPT = {
    "model_type": "opt",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 16,
    "max_position_embeddings": 16,
    "vocab_size": 32,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
BERT = {
    "model_type": "bert",
    "is_decoder": True,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "vocab_size": 32,
}


def network(fields: dict[str, Any], attention: str = "eager") -> Any:
    config = AutoConfig.for_model(**fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def qk_weights(model: Any) -> list[Tensor]:
    """Stored query and key weights, (out, in), found by name."""
    found = []
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.weight"):
            found += list(parameter.detach().T.tensor_split(3)[:2])
        elif name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
            found.append(parameter.detach())
    return found


@pytest.mark.parametrize("fields", [GPT2, OPT, BERT])
def test_decay_is_of_queries_and_keys_alone(fields: dict[str, Any]) -> None:
    model = network(fields)
    term = QKWeightDecay(0.25)(model)

    expected = 0.25 * sum(weight.double().square().sum() for weight in qk_weights(model))
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)

    term.backward()
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = torch.zeros_like(parameter)
        if name.endswith("c_attn.weight"):
            wanted[:, :32] = 0.5 * parameter.detach()[:, :32]
        elif name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
            wanted = 0.5 * parameter.detach()
        torch.testing.assert_close(grad, wanted)


def dense_entropy(logits: Tensor, visible: Tensor) -> float:
    """Row by row from the definition, in float64."""
    shares = []
    rows = logits.double().reshape(-1, logits.shape[-1])
    for row, seen in zip(rows, visible.reshape(rows.shape), strict=True):
        p = row[seen].softmax(0)
        if len(p) > 1:
            shares.append(-(p * p.log()).sum().item() / math.log(len(p)))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("is_causal", [True, False])
def test_entropy_of_rows(is_causal: bool) -> None:
    logits = 3 * torch.randn(2, 3, 7, 7)
    visible = torch.ones(7, 7, dtype=torch.bool).tril() if is_causal else torch.ones(7, 7, dtype=torch.bool)
    masked = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).requires_grad_()

    value = normalized_entropy(masked, masked.softmax(-1))

    assert value.item() == pytest.approx(dense_entropy(logits, visible.expand(logits.shape)), rel=1e-5)
    value.backward()
    step = torch.zeros_like(logits)
    step[1, 2, 5, 3] = 1e-3
    shifted = [dense_entropy(logits + sign * step, visible.expand(logits.shape)) for sign in (1, -1)]
    slope = (shifted[0] - shifted[1]) / 2e-3
    assert masked.grad[1, 2, 5, 3].item() == pytest.approx(slope, rel=1e-3, abs=1e-8)
    assert masked.grad.isfinite().all()


@pytest.mark.parametrize("fields", [GPT2, OPT, BERT])
def test_attention_that_keeps_its_entropy_changes_nothing(fields: dict[str, Any]) -> None:
    tokens = torch.randint(0, 32, (2, 10))
    losses, gradients = [], []
    for attention in ("eager", register_entropy_attention()):
        torch.manual_seed(1)
        model = network(fields, attention).train()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*gradients)
    model(input_ids=tokens, use_cache=False)
    reward = EntropyReward(2.0)(model)
    assert -2.0 < reward.item() < 0.0
    assert torch.autograd.grad(reward, qk_weights_live(model))[0].abs().sum() > 0


def qk_weights_live(model: Any) -> list[Tensor]:
    ends = ("c_attn.weight", "q_proj.weight", "query.weight")
    return [parameter for name, parameter in model.named_parameters() if name.endswith(ends)]


@pytest.mark.parametrize(("dim", "sizes"), [(0, [6]), (1, [4, 4])])
def test_sigma_reparam_against_a_dense_decomposition(dim: int, sizes: list[int]) -> None:
    start = torch.randn((6, 12) if dim == 1 else (6, 5), dtype=torch.float64)
    module = SigmaReparam(start, dim, sizes)
    # Training starts from the same function.
    torch.testing.assert_close(module(start), start)

    weight = torch.randn_like(start).requires_grad_()
    for _ in range(500):
        module.iterate(weight)
    value = module(weight)

    other = weight.detach().clone().requires_grad_()
    parts, at = [], 0
    for index, size in enumerate(sizes):
        part = other.narrow(dim, at, size)
        parts.append(module.gain[index].detach() * part / torch.linalg.svdvals(part)[0])
        at += size
    expected = torch.cat([*parts, other.narrow(dim, at, other.shape[dim] - at)], dim)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    direction = torch.randn_like(value)
    (value * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(weight.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [GPT2, OPT, BERT])
def test_sigma_reparam_in_a_network(fields: dict[str, Any]) -> None:
    model = network(fields).eval()
    tokens = torch.randint(0, 32, (2, 10))
    before = model(tokens).logits
    handles = add_sigma_reparam(model)
    torch.testing.assert_close(model(tokens).logits, before)
    assert len(handles) == len([name for name, _ in model.named_parameters() if name.endswith("original")])
    gains = [p for name, p in model.named_parameters() if name.endswith("gain")]
    layers = {"gpt2": 2, "opt": 2, "bert": 1}[fields["model_type"]]
    assert sum(p.numel() for p in gains) == 2 * layers
    model.train()
    u = [b.clone() for name, b in model.named_buffers() if name.endswith(".u")]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("original"):
                parameter.add_(torch.randn_like(parameter))
    model(tokens)
    after = [b for name, b in model.named_buffers() if name.endswith(".u")]
    assert all(not torch.equal(a, b) for a, b in zip(u, after, strict=True))


def test_sigma_reparam_names_a_layer_that_it_does_not_know() -> None:
    fields = {"model_type": "gpt_neox", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    with pytest.raises(ValueError, match="expected q_proj and k_proj"):
        add_sigma_reparam(network(fields | {"vocab_size": 32, "intermediate_size": 16}))


def test_token_similarity_is_a_mean_of_cosines() -> None:
    hidden = torch.randn(3, 6, 4)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    expected = []
    for sequence, counted in zip(hidden.double(), mask, strict=True):
        tokens = sequence[counted.bool()]
        pairs = [(i, j) for i in range(len(tokens)) for j in range(len(tokens)) if i != j]
        cosines = [torch.cosine_similarity(tokens[i], tokens[j], dim=0) for i, j in pairs]
        if cosines:
            expected.append(torch.stack(cosines).mean())
    torch.testing.assert_close(
        token_similarity(hidden, mask).double(), torch.stack(expected), rtol=1e-5, atol=1e-6
    )
    assert token_similarity(torch.ones(1, 5, 4)).item() == pytest.approx(1.0)


def test_the_penalty_is_part_of_the_loss_and_not_of_the_log(tmp_path: Path) -> None:
    vit = {
        "model_type": "vit",
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_labels": 10,
    }
    weights, losses = [], []
    for penalty in (None, QKWeightDecay(100.0)):
        pl.seed_everything(0, verbose=False)
        module = PenalizedModule(vit, "image_classification", lr=1e-2, schedule="constant")
        module.penalty = penalty
        trainer = pl.Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loaders = digits(0, batch_size=8, train=100, choose=100)
        trainer.fit(module, loaders["train"])
        losses.append(float(trainer.callback_metrics["train/loss"]))
        weights.append(torch.stack([w.norm() for w in qk_weights(module.network)]))
    assert (weights[1] < 0.8 * weights[0]).all()
    assert losses[1] < 10


def test_digits_are_split_the_same_way_for_every_seed() -> None:
    def rows(loader: DataLoader) -> set[bytes]:
        return {
            batch["pixel_values"][i].numpy().tobytes()
            for batch in loader
            for i in range(len(batch["labels"]))
        }

    one, other = (digits(seed, batch_size=50, train=500, choose=297) for seed in (0, 1))
    for part in ("train", "choose", "test"):
        assert rows(one[part]) == rows(other[part])
    assert [len(one[part].dataset) for part in ("train", "choose", "test")] == [500, 297, 1000]
    first = [next(iter(loaders["train"]))["labels"].tolist() for loaders in (one, other)]
    assert first[0] != first[1]


def test_everything_that_a_run_depends_on_is_in_its_key() -> None:
    config = configuration("paper", "variance", 0.3, 0)
    assert cache_key(config) == cache_key(dict(reversed(config.items())))
    changes = [
        configuration("gpt_pre", "variance", 0.3, 0),
        configuration("paper", "target", 0.3, 0),
        configuration("paper", "variance", 0.31, 0),
        configuration("paper", "variance", 0.3, 1),
        configuration("paper", "variance", 0.3, 0, steps=7),
        {**config, "model": {**config["model"], "hidden_size": 64}},
    ]
    assert len({cache_key(c) for c in [config, *changes]}) == 7
    with pytest.raises(ValueError, match="expected a coefficient"):
        configuration("paper", "baseline", 0.3, 0)


def test_a_run_that_is_in_the_cache_is_not_trained_again(tmp_path: Path) -> None:
    config = configuration("vit", "baseline", None, 0, steps=2, evaluate_batches=1)
    first = cached_train(config, None, tmp_path)
    assert set(first["results"]["test"]) >= {"loss", "accuracy"}
    assert first["results"]["spectrum"]["steps"][0] == 0
    (path,) = (tmp_path / "locater").iterdir()
    path.write_text(path.read_text().replace('"method": "baseline"', '"method": "seen"'))
    assert cached_train(config, None, tmp_path)["method"] == "seen"


def run(
    method: str, coefficient: float | None, seed: int, score: float, frobenius: float = 1.0
) -> dict[str, Any]:
    """A run of the paper's setting with given numbers."""
    spectrum = {
        name: [1.0, frobenius] for name in ("sym_var", "eig_mean", "frobenius_sq", "concentration", "entropy")
    }
    return {
        "setting": "paper",
        "method": method,
        "coefficient": coefficient,
        "seed": seed,
        "results": {
            "choose": {"perplexity": score, "loss": math.log(score)},
            "test": {"perplexity": score + 1, "loss": math.log(score + 1)},
            "train_loss": 1.0,
            "entropy": 0.5 + (method == "variance") * 0.1,
            "similarity": 0.1,
            "cpu_seconds": 1.0,
            "spectrum": {"steps": [0, 1], "entropy_steps": [0, 1], **spectrum},
            "curve": {"steps": [1, 2], "loss": [score + 2, score]},
        },
    }


def test_coefficients_are_chosen_by_the_part_that_is_not_tested_on() -> None:
    seeds = (100, 101)
    table = {
        ("baseline", None): (10, 50),
        ("variance", 0.1): (9, 20),
        ("variance", 1.0): (8, 5),
        ("target", 0.1): (9, 20),
        ("weight_decay", 0.1): (7, 100),
        ("weight_decay", 1.0): (9.5, 6),
        ("entropy", 0.1): (11, 30),
    }
    runs = [
        run(*key, seed, score + 0.1 * (seed == 101), f) for key, (score, f) in table.items() for seed in seeds
    ]
    found = Runs("paper", list(table), seeds, runs)
    assert choose(found) == {
        "variance": ("variance", 1.0),
        "weight_decay": ("weight_decay", 0.1),
        "matched_decay": ("weight_decay", 1.0),
        "entropy": ("entropy", 0.1),
        "sigma_reparam": ("sigma_reparam", None),
    }
    rows = {(row["method"], row["coefficient"]): row for row in found.summary()}
    # Lower perplexity is a gain, paired by seed: the seeds' common shift leaves no width.
    assert rows[("variance", 1.0)]["gain"] == pytest.approx((2.0, 2.0, 2.0))
    assert rows[("entropy", 0.1)]["gain"][0] == pytest.approx(-1.0)
    assert rows[("variance", 1.0)]["entropy_gain"][0] == pytest.approx(0.1)
    assert "gain" not in rows[("baseline", None)]
    (curves,) = [row for row in found.curves() if (row["label"], row["coefficient"]) == ("variance", 1.0)]
    assert curves["held_out_loss"] == pytest.approx([10.05, 8.05])
    assert curves["held_out_gain"][1] == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_run_gives_the_numbers_that_are_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerances leave room for another processor's rounding, not for another regularizer."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])  # for the processes
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    data = EXAMPLES.parents[2] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("needs WikiText-2 and SST-2")
    main(["--quick", "--out", str(tmp_path), "--data", str(data), "--jobs", "2"])

    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"locater_{figure}.png" for figure in ("paper", "settings", "spectra")
    }
    found, committed = (read("locater", folder)["settings"] for folder in (tmp_path, EXAMPLES / "quick"))
    assert found.keys() == committed.keys()
    assert found["paper"]["chosen"] == committed["paper"]["chosen"]
    for setting in found:
        for own, other in zip(
            found[setting]["main"]["runs"], committed[setting]["main"]["runs"], strict=True
        ):
            assert (own["label"], own["coefficient"]) == (other["label"], other["coefficient"])
            for name, tolerance in (("loss", 0.01), ("entropy", 0.01), ("similarity", 0.02)):
                assert own[name][0] == pytest.approx(other[name][0], abs=tolerance), (
                    setting,
                    own["label"],
                    name,
                )
            assert own["frobenius_sq"][0] == pytest.approx(other["frobenius_sq"][0], rel=0.05)


def test_weights_of_the_papers_setting_start_as_those_of_torch(tmp_path: Path) -> None:
    fields = {
        **OPT,
        "hidden_size": 128,
        "word_embed_proj_dim": 128,
        "vocab_size": 500,
        "tie_word_embeddings": False,
    }
    module = PenalizedModule(fields)
    module.torch_initialization = True
    module._trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    tokens = module.network.get_input_embeddings().weight
    assert tokens.std().item() == pytest.approx(1.0, abs=0.02)
    for weight in qk_weights(module.network):
        assert weight.abs().max().item() <= 128**-0.5
        assert weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.05)
    assert module.network.get_output_embeddings().weight is not tokens
