"""The LightningModule: training, metrics, checkpoints, export."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_qk import TextDataModule, TransformerModule

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LINES = "".join(f"line {index % 7} of the text\n" for index in range(120))
TABLE = "text,label\n" + "".join(
    f"{('good', 'bad', 'so')[index % 3]} number {index},{('pos', 'neg', 'mid')[index % 3]}\n"
    for index in range(60)
)


def data_for(task: str, folder: Path, **arguments: Any) -> TextDataModule:
    name, text = ("rows.csv", TABLE) if task == "sequence_classification" else ("lines.txt", LINES)
    (folder / name).write_text(text)
    return TextDataModule(
        **{
            "source": str(folder / name),
            "task": task,
            "block_size": 32,
            "max_length": 32,
            "batch_size": 8,
            "cache_dir": str(folder / "cache"),
            **arguments,
        }
    )


def trainer_for(folder: Path, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            **arguments,
        }
    )


@pytest.mark.parametrize(
    ("task", "fields", "keys"),
    [
        ("causal_lm", GPT2, {"loss", "perplexity"}),
        ("masked_lm", BERT, {"loss", "perplexity"}),
        ("sequence_classification", BERT, {"loss", "accuracy", "f1"}),
        ("sequence_classification", GPT2, {"loss", "accuracy", "f1"}),
    ],
)
def test_every_task_learns(task: str, fields: dict[str, Any], keys: set[str], tmp_path: Path) -> None:
    data = data_for(task, tmp_path)
    module = TransformerModule(fields, task, lr=5e-3, schedule="constant")
    [before] = trainer_for(tmp_path).validate(module, data, verbose=False)

    trainer = trainer_for(tmp_path, max_steps=40, limit_val_batches=0)
    trainer.fit(module, data)

    assert {"train/loss", "lr"} <= set(trainer.callback_metrics)
    [after] = trainer_for(tmp_path).validate(module, data, verbose=False)
    assert set(after) == {f"val/{key}" for key in keys}
    assert after["val/loss"] < 0.75 * before["val/loss"]
    [predicted] = trainer_for(tmp_path, limit_predict_batches=1).predict(module, data)
    assert predicted["predictions"].shape == predicted["logits"].shape[:-1]
    if task == "sequence_classification":
        assert module.label_names == ["mid", "neg", "pos"]
        assert [module.label_names[index] for index in predicted["predictions"]] == predicted["labels"]


def test_perplexity_is_exp_of_the_mean_over_tokens(tmp_path: Path) -> None:
    module = TransformerModule(GPT2)
    data = data_for("causal_lm", tmp_path, batch_size=7)
    trainer_for(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    # Batches of different sizes with different shares of ignored tokens.
    batches = []
    for index, batch in enumerate(data.train_dataloader()):
        labels = batch["labels"].clone()
        labels[:, : 5 * index + 1] = -100
        batches.append({**batch, "labels": labels})

    class Prepared(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, index: int) -> Any:
            return batches[index]

    [result] = trainer_for(tmp_path).test(module, DataLoader(Prepared(), batch_size=None), verbose=False)

    network = module.network.eval()
    terms = []
    with torch.no_grad():
        for batch in batches:
            logits = network(batch["input_ids"]).logits[:, :-1].double()
            terms.append(
                cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
            )
    kept = torch.cat(terms)
    kept = kept[torch.cat([batch["labels"][:, 1:].flatten() for batch in batches]) != -100]
    assert len({len(batch["labels"]) for batch in batches}) > 1
    assert result["test/perplexity"] == pytest.approx(math.exp(kept.mean().item()), rel=1e-5)
    assert result["test/loss"] == pytest.approx(kept.mean().item(), rel=1e-5)


def test_masked_perplexity_counts_the_masked_tokens(tmp_path: Path) -> None:
    module = TransformerModule(BERT, "masked_lm")
    data = data_for("masked_lm", tmp_path, batch_size=3)
    [result] = trainer_for(tmp_path).validate(module, data, verbose=False)

    network = module.network.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in data.val_dataloader():
            chosen = batch["labels"] != -100
            logits = network(batch["input_ids"]).logits[chosen].double()
            total += cross_entropy(logits, batch["labels"][chosen], reduction="sum").item()
            count += chosen.sum().item()
    assert result["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_metrics_are_those_of_all_rows(classes: int, tmp_path: Path) -> None:
    rows = "".join(f"text {index},c{(index * index) % 7 % classes}\n" for index in range(40))
    (tmp_path / "a.csv").write_text("text,label\n" + rows)
    data = TextDataModule(
        str(tmp_path / "a.csv"),
        "sequence_classification",
        val_files=str(tmp_path / "a.csv"),
        max_length=32,
        batch_size=7,
        cache_dir=str(tmp_path / "cache"),
    )
    module = TransformerModule(BERT, "sequence_classification")
    torch.manual_seed(2)
    [result] = trainer_for(tmp_path).validate(module, data, verbose=False)

    predicted = torch.cat([p["predictions"] for p in trainer_for(tmp_path).predict(module, data)]).tolist()
    target = torch.cat([batch["labels"] for batch in data.val_dataloader()]).tolist()
    scores = f1_scores(predicted, target)
    assert result["val/accuracy"] == pytest.approx(accuracy(predicted, target))
    assert result["val/f1"] == pytest.approx(sum(scores.values()) / len(scores), abs=1e-6)
    assert ("val/f1_binary" in result) == (classes == 2)
    if classes == 2:
        assert result["val/f1_binary"] == pytest.approx(scores.get(1, 0.0), abs=1e-6)


def accuracy(predicted: list[int], target: list[int]) -> float:
    return sum(p == t for p, t in zip(predicted, target, strict=True)) / len(target)


def f1_scores(predicted: list[int], target: list[int]) -> dict[int, float]:
    pairs = list(zip(predicted, target, strict=True))
    scores = {}
    for label in sorted({*predicted, *target}):
        hits = sum(p == t == label for p, t in pairs)
        scores[label] = 2 * hits / (sum(p == label for p, _ in pairs) + sum(t == label for _, t in pairs))
    return scores


def weights(module: TransformerModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.network.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_ends_where_an_unbroken_one_ends(tmp_path: Path) -> None:
    def run(resume: Path | None = None, save: bool = False) -> TransformerModule:
        torch.manual_seed(0)
        module = TransformerModule({**GPT2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, lr=1e-3)
        trainer = trainer_for(
            tmp_path,
            max_epochs=4,
            limit_val_batches=0,
            callbacks=[ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)] if save else [],
            enable_checkpointing=save,
        )
        trainer.fit(module, data_for("causal_lm", tmp_path), ckpt_path=resume)
        return module

    whole = weights(run(save=True))
    assert same(whole, weights(run(tmp_path / "epoch=1.ckpt")))
    assert not same(whole, weights(TransformerModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt")))


def test_load_from_checkpoint_needs_no_data_and_no_pretrained_folder(tmp_path: Path) -> None:
    data = data_for("sequence_classification", tmp_path)
    first = TransformerModule(BERT, "sequence_classification", save_pretrained_to=str(tmp_path / "model"))
    trainer_for(tmp_path, max_steps=1, limit_val_batches=0).fit(first, data)
    module = TransformerModule(str(tmp_path / "model"), "sequence_classification", lr=3e-4)
    trainer = trainer_for(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, data_for("sequence_classification", tmp_path))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for file in (tmp_path / "model").iterdir():
        file.unlink()

    loaded = TransformerModule.load_from_checkpoint(tmp_path / "a.ckpt")

    torch.load(tmp_path / "a.ckpt", weights_only=True)  # holds nothing that could run code
    assert loaded.label_names == ["mid", "neg", "pos"]
    assert loaded.lr == 3e-4
    assert same(weights(loaded), weights(module))


def test_the_exported_folder_loads_in_transformers(tmp_path: Path) -> None:
    data = data_for("causal_lm", tmp_path)
    module = TransformerModule(GPT2, save_pretrained_to=str(tmp_path / "out"))
    trainer_for(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)

    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    assert same(dict(network.state_dict()), weights(module))
    assert network.config.use_cache is True
    assert module.network.config.use_cache is False
    assert tokenizer("text")["input_ids"] == data.tokenizer("text")["input_ids"]
    text = network.generate(
        **tokenizer("li", return_tensors="pt", add_special_tokens=False), max_new_tokens=3
    )
    assert text.shape == (1, 5)


def test_a_pretrained_model_brings_its_tokenizer(tmp_path: Path) -> None:
    data = data_for("sequence_classification", tmp_path)
    module = TransformerModule(BERT, "sequence_classification", save_pretrained_to=str(tmp_path / "model"))
    trainer_for(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    data.tokenizer.add_tokens(["number"])
    data.tokenizer.save_pretrained(tmp_path / "model")
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    network.resize_token_embeddings(264)
    network.save_pretrained(tmp_path / "model")

    again = data_for("sequence_classification", tmp_path)
    trained = TransformerModule(str(tmp_path / "model"), "sequence_classification")
    trainer_for(tmp_path, max_steps=1, limit_val_batches=0).fit(trained, again)

    assert len(again.tokenizer) == 264
    assert trained.network.training
    assert len(data_for("sequence_classification", tmp_path).tokenizer) == 263


def learning_rates(schedule: str, folder: Path, steps: dict[str, int], **arguments: Any) -> list[float]:
    class Record(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    record = Record()
    module = TransformerModule(GPT2, lr=1.0, schedule=schedule, **arguments)
    trainer = trainer_for(folder, limit_val_batches=0, callbacks=[record], accumulate_grad_batches=2, **steps)
    trainer.fit(module, data_for("causal_lm", folder, batch_size=4))
    return record.seen


def test_schedules_go_by_optimizer_steps(tmp_path: Path) -> None:
    assert learning_rates("constant", tmp_path, {"max_steps": 4}, warmup_steps=2) == [0.0, 0.5, 1.0, 1.0]
    assert learning_rates("linear", tmp_path, {"max_steps": 5}, warmup_ratio=0.2) == [
        0.0,
        1.0,
        0.75,
        0.5,
        0.25,
    ]
    cosine = learning_rates("cosine", tmp_path, {"max_steps": 4})
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    by_epochs = learning_rates("linear", tmp_path, {"max_epochs": 2})
    assert by_epochs == pytest.approx([1 - step / len(by_epochs) for step in range(len(by_epochs))])


def test_a_schedule_that_ends_needs_a_run_that_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected max_steps or max_epochs for the schedule 'linear'"):
        learning_rates("linear", tmp_path, {"max_steps": -1, "max_epochs": -1})


def test_biases_and_norms_do_not_decay(tmp_path: Path) -> None:
    module = TransformerModule(BERT, "masked_lm", weight_decay=0.3, betas=(0.8, 0.95))
    trainer = trainer_for(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, data_for("masked_lm", tmp_path))

    [optimizer] = trainer.optimizers
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]
    }
    free = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.0 for p in group["params"]
    }
    for name, parameter in module.named_parameters():
        plain = name.endswith("bias") or "LayerNorm" in name
        assert (id(parameter) in free) == plain, name
        assert (id(parameter) in decayed) != plain, name
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = TransformerModule(GPT2, gradient_checkpointing=checkpointing)
        trainer_for(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data_for("causal_lm", tmp_path))
        assert any(getattr(m, "gradient_checkpointing", False) for m in module.modules()) == checkpointing
        found.append(weights(module))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_bf16_true_makes_a_bf16_network(tmp_path: Path) -> None:
    module = TransformerModule(GPT2)
    trainer = trainer_for(tmp_path, max_steps=1, limit_val_batches=0, precision="bf16-true")
    trainer.fit(module, data_for("causal_lm", tmp_path))

    assert module.network.dtype == torch.bfloat16


def test_a_plain_data_loader_does(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    module = TransformerModule({**GPT2, "vocab_size": 10})
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.fit(module, DataLoader(rows, batch_size=2))  # type: ignore[arg-type]

    assert module.network.config.vocab_size == 10


def test_two_builds_are_one(tmp_path: Path) -> None:
    module = TransformerModule(GPT2)
    module.configure_model()
    assert module.model is None
    trainer_for(tmp_path).validate(module, data_for("causal_lm", tmp_path), verbose=False)
    network = module.network
    module.configure_model()
    assert module.network is network


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "seq2seq"}, "sequence_classification, image_classification, got 'seq2seq'"),
        ({"schedule": "cosin"}, "expected a schedule out of constant, linear, cosine, got 'cosin'"),
        ({"lr": 0.0}, "expected a learning rate above 0, got 0.0"),
        ({"lr": math.nan}, "expected a learning rate above 0, got nan"),
        ({"warmup_steps": -1}, "expected warmup_steps of at least 0"),
        ({"warmup_ratio": 1.0}, "expected warmup_steps of at least 0 and a warmup_ratio"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "expected warmup_steps or warmup_ratio, got both"),
    ],
)
def test_arguments_out_of_range_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerModule(GPT2, **arguments)


def test_a_network_that_is_not_built_is_told() -> None:
    with pytest.raises(ValueError, match="expected a network that is built"):
        _ = TransformerModule(GPT2).network


def test_blocks_longer_than_the_positions_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most 32 tokens, .* got 33"):
        trainer_for(tmp_path).validate(
            TransformerModule(GPT2), data_for("causal_lm", tmp_path, block_size=33)
        )


VIT = {
    "model_type": "vit",
    "image_size": 4,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
}


def test_images_are_classified(tmp_path: Path) -> None:
    labels = torch.arange(48) % 3
    pixels = 0.1 * torch.randn(48, 1, 4, 4) + (labels[:, None, None, None] - 1.0)
    loader = DataLoader(
        [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)], batch_size=10
    )
    module = TransformerModule(VIT, "image_classification", lr=1e-2, schedule="constant")
    trainer = trainer_for(tmp_path, max_steps=40)
    trainer.fit(module, loader, loader)

    assert {"train/loss", "val/loss", "val/accuracy", "val/f1"} <= set(trainer.callback_metrics)
    [scores] = trainer.test(module, loader, verbose=False)
    [*predicted] = trainer.predict(module, loader)
    predictions = torch.cat([part["predictions"] for part in predicted])
    assert scores["test/accuracy"] == pytest.approx((predictions == labels).float().mean().item())
    assert scores["test/accuracy"] > 0.9
    assert predicted[0]["labels"] == [f"LABEL_{index}" for index in predictions[:10].tolist()]


def test_text_data_are_of_no_use_for_images() -> None:
    with pytest.raises(
        ValueError, match="expected a task out of causal_lm, masked_lm, sequence_classification, got"
    ):
        TextDataModule("stdlib", "image_classification")
    with pytest.raises(ValueError, match="image_classification, got 'images'"):
        TransformerModule(VIT, "images")
