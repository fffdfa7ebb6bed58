import pytest
import torch
import transformers as tf
from heads_oracle import project, randomize, run
from heads_zoo import GQA, VIT

from lightning_qk.functional.rotary import rotate
from lightning_qk.heads.reader import head_projections

MIXED = {
    # Only the sliding layers rotate.
    "cohere2": ("Cohere2", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
}


@pytest.mark.parametrize("name", sorted(MIXED))
def test_layers_that_do_not_rotate_are_told_apart(name):
    family, options = MIXED[name]
    config = getattr(tf, family + "Config")(**GQA, **options)
    model = randomize(getattr(tf, family + "Model")(config)).double().eval()
    tokens = torch.randint(3, 50, (1, 7), generator=torch.Generator().manual_seed(0))
    calls = run(model, {"input_ids": tokens})
    read = head_projections(model)
    assert [heads.rotary is not None for heads in read.values()] == [True, False]
    for layer, call in calls.items():
        heads = read[layer]
        query = project(heads.query, heads.query_bias, call.query_input)
        if heads.rotary is not None:
            columns = query.permute(2, 0, 1, 3)[..., None]
            turned = [
                rotate(column, heads.rotary, torch.tensor(place)) for place, column in enumerate(columns)
            ]
            query = torch.stack(turned)[..., 0].permute(1, 2, 0, 3)
        torch.testing.assert_close(query, call.query, rtol=1e-5, atol=1e-5)


def test_a_rotation_the_other_way_has_negative_frequencies():
    model = tf.NanoChatModel(tf.NanoChatConfig(**GQA))
    for heads in head_projections(model).values():
        torch.testing.assert_close(heads.rotary.inv_freq, -model.rotary_emb.inv_freq)
        assert heads.rotary.interleaved is False


@pytest.mark.parametrize(
    ("family", "options", "interleaved", "pairs"),
    [
        ("Llama", {}, False, 4),
        ("Cohere", {}, True, 4),
        ("Glm", {"head_dim": 8}, True, 2),
        ("GPTNeoX", {}, False, 1),
    ],
)
def test_pairing_and_rotated_share(family, options, interleaved, pairs):
    model = getattr(tf, family + "Model")(getattr(tf, family + "Config")(**GQA, **options))
    for heads in head_projections(model).values():
        assert heads.rotary.interleaved is interleaved
        assert heads.rotary.inv_freq.shape == (pairs,)


def test_frequencies_are_the_models_live_buffer():
    model = tf.LlamaModel(tf.LlamaConfig(**GQA))
    for heads in head_projections(model).values():
        assert heads.rotary.inv_freq is model.rotary_emb.inv_freq


def test_images_are_not_rotated_by_one_position():
    config = tf.Dinov2Config(**VIT)
    assert all(heads.rotary is None for heads in head_projections(tf.Dinov2Model(config)).values())
    config = tf.PixtralVisionConfig(**VIT)
    assert all(heads.rotary is None for heads in head_projections(tf.PixtralVisionModel(config)).values())
