"""Networks that fit a tokenizer and labels, and errors for those that do not."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qk.data.tokenizers import byte_tokenizer
from lightning_qk.module.network import (
    check_length,
    config_from_text,
    config_to_text,
    make_config,
    network_from_config,
    network_from_pretrained,
)

TOKENIZER = byte_tokenizer()
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}


def test_config_takes_vocabulary_tokens_and_labels_from_the_data() -> None:
    config = make_config(BERT, TOKENIZER, ["no", "yes", "maybe"])

    assert config.vocab_size == 263
    assert config.pad_token_id == TOKENIZER.pad_token_id
    assert config.num_labels == 3
    assert config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    network = network_from_config(config, "sequence_classification")
    assert network.classifier.weight.shape == (3, 8)
    assert network.get_input_embeddings().weight.shape == (263, 8)


def test_what_is_given_is_kept() -> None:
    config = make_config({**GPT2, "vocab_size": 320, "eos_token_id": 5}, TOKENIZER)

    assert (config.vocab_size, config.eos_token_id) == (320, 5)
    assert config.bos_token_id == TOKENIZER.bos_token_id
    assert make_config(GPT2).vocab_size == 50257


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 1}, "expected model_type among the fields of the model, got n_layer"),
        ({"model_type": "gtp2"}, "got 'gtp2': did you mean 'gpt2'"),
        (
            {**GPT2, "n_layers": 1},
            "expected the fields of a gpt2 config, got 'n_layers': did you mean 'n_layer'",
        ),
        ({**GPT2, "vocab_size": 100}, "expected a vocab_size of at least 263, the tokenizer's, got 100"),
    ],
)
def test_fields_that_are_wrong_are_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_config(fields, TOKENIZER)
    assert "\n" not in str(caught.value)


def test_a_value_of_the_wrong_type_is_told() -> None:
    with pytest.raises(ValueError, match=r"expected .* gpt2 .*: c") as caught:
        network_from_config(make_config({**GPT2, "n_layer": "many"}), "causal_lm")
    assert "\n" not in str(caught.value)


def test_other_names_of_a_field_are_fields() -> None:
    assert make_config({"model_type": "gpt2", "num_hidden_layers": 3}).n_layer == 3


def test_a_task_that_a_model_does_not_do_is_told() -> None:
    with pytest.raises(ValueError, match=r"expected a model type .* AutoModelForMaskedLM of, got 'gpt2'"):
        network_from_config(make_config(GPT2), "masked_lm")


def test_an_attention_that_does_not_exist_is_told() -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdqa'") as caught:
        network_from_config(make_config(GPT2), "causal_lm", "sdqa")
    assert "\n" not in str(caught.value)
    config = network_from_config(make_config(GPT2), "causal_lm", "eager").config
    assert config._attn_implementation == "eager"


def test_dtype_is_the_default_one(tmp_path: Path) -> None:
    network = network_from_config(make_config(GPT2, TOKENIZER), "causal_lm").bfloat16()
    network.save_pretrained(tmp_path)

    assert network_from_pretrained(str(tmp_path), "causal_lm").dtype == torch.float32


def test_pretrained_weights_with_a_head_for_the_labels(tmp_path: Path) -> None:
    network = network_from_config(make_config(BERT, TOKENIZER, ["a", "b"]), "sequence_classification")
    network.save_pretrained(tmp_path)

    loaded = network_from_pretrained(str(tmp_path), "sequence_classification", TOKENIZER, ["x", "y", "z"])

    assert loaded.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert loaded.classifier.weight.shape == (3, 8)
    old = network.bert.encoder.layer[0].attention.self.query.weight
    assert torch.equal(loaded.bert.encoder.layer[0].attention.self.query.weight, old)
    same = network_from_pretrained(str(tmp_path), "sequence_classification", TOKENIZER, ["a", "b"])
    assert torch.equal(same.classifier.weight, network.classifier.weight)


def test_new_weights_are_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the table of transformers, which stays where loading fails and its error refers to it."""
    network = network_from_config(make_config(BERT, TOKENIZER, ["a", "b"]), "sequence_classification")
    network.save_pretrained(tmp_path)
    for name in ("lightning", "lightning.pytorch", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO)

    network_from_pretrained(str(tmp_path), "sequence_classification", TOKENIZER, ["x", "y", "z"])

    said = [record.getMessage() for record in caplog.records if "random" in record.getMessage()]
    assert said == [
        f"lightning-qk: not in {tmp_path}, and random unless a checkpoint has them: classifier.bias, "
        "classifier.weight"
    ]
    assert "LOAD REPORT" not in caplog.text
    caplog.clear()
    network_from_pretrained(str(tmp_path), "sequence_classification", TOKENIZER, ["a", "b"])
    assert "random" not in caplog.text
    network.config.vocab_size += 1
    network.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected weights in '.*' that fit its config, got other sizes"):
        network_from_pretrained(str(tmp_path), "sequence_classification")
    assert "LOAD REPORT" in caplog.text


def test_pretrained_models_that_are_not_there_or_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with a model, .* got '.*/none'") as caught:
        network_from_pretrained(str(tmp_path / "none"), "causal_lm")
    assert "\n" not in str(caught.value)
    network = network_from_config(make_config({**GPT2, "vocab_size": 100}), "causal_lm")
    network.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"expected a tokenizer of at most 100 tokens .* got one of 263"):
        network_from_pretrained(str(tmp_path / "small"), "causal_lm", TOKENIZER)
    (tmp_path / "small" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected the weights of a model in") as caught:
        network_from_pretrained(str(tmp_path / "small"), "causal_lm")
    assert "\n" not in str(caught.value)


def test_texts_longer_than_the_positions_are_told() -> None:
    network = network_from_config(make_config(GPT2), "causal_lm")
    check_length(network, 16)
    with pytest.raises(ValueError, match=r"at most 16 tokens, .* got 17: lower block_size or max_length"):
        check_length(network, 17)
    llama = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 8,
        "intermediate_size": 8,
        "max_position_embeddings": 16,
    }
    check_length(network_from_config(make_config(llama, TOKENIZER), "causal_lm"), 17)


def test_a_config_survives_as_text() -> None:
    config = make_config({**BERT, "attention_probs_dropout_prob": 0.3}, TOKENIZER, ["no", "yes"])

    again = config_from_text(config_to_text(config))

    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()
    assert again.id2label == {0: "no", 1: "yes"}
