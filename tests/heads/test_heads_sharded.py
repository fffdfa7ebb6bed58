"""Sharded weights in two processes against the same weights in one, and what cannot be read."""

from pathlib import Path

import models
import pytest
import torch
from processes import run_script
from torch import nn

from lightning_qk import head_projections, locater_penalty
from lightning_qk.heads.reader import ProjectionReader, unread
from lightning_qk.heads.sites import local_heads

DTENSORS = [
    "fsdp2",
    "fsdp2 qk-norm",
    "fsdp2 uneven",
    "fsdp2 bf16",
    "tp",
    "fsdp2 1 x tp 2",
    "fsdp2 2 x tp 1",
]
# Adapters are gathered beside the weights that they add to.
ADAPTED = ["fsdp2 lora", "fsdp2 dora"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_script(Path(__file__).with_name("sharded_job.py"), folder, processes=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def close(got: dict, want: dict, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", DTENSORS + ADAPTED)
def test_weights_are_those_of_one_process(ranks, case):
    for rank in ranks:
        got, want = rank[case]["got"], rank[case]["want"]
        for fold in ("weightsFalse", "weightsTrue"):
            assert want[fold]
            close(got[fold], want[fold], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", DTENSORS + ADAPTED)
@pytest.mark.parametrize("way", ["loss", "callback"])
def test_gradients_on_the_shards_are_those_of_one_process(ranks, case, way):
    for rank in ranks:
        got, want = rank[case]["got"], rank[case]["want"]
        assert want[way]
        assert all(grad.norm() > 0 for grad in want[way].values())
        close(got[way], want[way], 1e-5)
        for value in ("penalty", "value"):
            torch.testing.assert_close(got[value], want[value])
        assert rank[case]["reached"]


@pytest.mark.slow
@pytest.mark.parametrize("case", DTENSORS)
def test_spectra_are_those_of_one_process(ranks, case):
    for rank in ranks:
        torch.testing.assert_close(
            rank[case]["got"]["spectrum"],
            rank[case]["want"]["spectrum"],
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", DTENSORS)
def test_one_layer_is_gathered_at_a_time(ranks, case):
    result = ranks[0][case]
    # Query, key, biases and norms of one layer; a second layer would double it.
    for way in ("peak_loss", "peak_callback", "peak_metric"):
        assert 0 < result[way] < 1.2 * result["layer"]


@pytest.mark.slow
@pytest.mark.parametrize("case", DTENSORS)
def test_frozen_shards_get_no_gradient(ranks, case):
    for rank in ranks:
        assert rank[case]["frozen"] == {}
        assert not rank[case]["reached_frozen"]


@pytest.mark.slow
def test_heads_that_live_on_a_rank(ranks):
    for index, rank in enumerate(ranks):
        own = (0, 2) if index == 0 else (2, 4)
        assert rank["tp"]["local_heads"] == [own] * 3
        assert rank["fsdp2 1 x tp 2"]["local_heads"] == [own] * 3
        assert rank["fsdp2 2 x tp 1"]["local_heads"] == [None] * 3
        assert rank["fsdp2"]["local_heads"] == [None] * 3
    assert local_heads(models.llama().model.layers[0].self_attn, 4) is None


@pytest.mark.slow
def test_flat_parameters(ranks):
    for rank in ranks:
        flat = rank["flat"]
        assert flat["want"]["weights"]
        close(flat["got"]["weights"], flat["want"]["weights"], 1e-6)
        assert flat["reached"]
        close(flat["got"]["stepped"], flat["want"]["stepped"], 1e-5)
        assert "use the callback LocAteR" in flat["loss_error"]
        assert "pass use_orig_params=True to FSDP" in flat["flat_error"]
        assert "read after the first forward" in flat["root_error"]
        assert flat["after_forward"] == 3


def zero_3() -> nn.Module:
    """Parameters as DeepSpeed leaves them: empty, with a status of their own."""
    model = models.llama()
    for index, parameter in enumerate(model.parameters()):
        parameter.data = torch.empty(0)
        parameter.ds_id, parameter.ds_status = index, "NOT_AVAILABLE"
    return model


def on_meta() -> nn.Module:
    return models.llama().to("meta")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zero_3, "q_proj' is partitioned by DeepSpeed ZeRO stage 3.*use stage 1 or 2, or FSDP2"),
        (on_meta, "q_proj' is on the meta device, where it has no values: load or initialize"),
    ],
)
def test_weights_out_of_reach_are_refused_with_the_way_out(make, message):
    model = make()
    for read in (head_projections, locater_penalty, ProjectionReader):
        with pytest.raises(
            ValueError, match=f"expected weights that this process can read, got 2.*{message}"
        ):
            read(model)
    assert all("stage 3" in reason or "meta device" in reason for reason in unread(model).values())


def test_a_reader_is_lazy_and_live():
    model = models.llama()
    reader = ProjectionReader(model)
    name = next(iter(reader))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    torch.testing.assert_close(reader[name].query, head_projections(model)[name].query)
    model.double()
    assert reader[name].query.dtype == torch.float64
    assert not reader.refresh()
    assert not reader.is_sharded(name)


def test_a_reader_notices_replaced_modules():
    model = models.llama()
    reader = ProjectionReader(model)
    layer = model.model.layers[1].self_attn
    layer.q_proj = nn.Linear(32, 32, bias=True)
    assert reader.refresh()
    assert reader["model.layers.1.self_attn"].query_bias is not None
    kept = locater_penalty(model)
    layer.k_proj = nn.Linear(32, 16)
    assert locater_penalty(model) != kept
    del model.model.layers[1]
    assert reader.refresh()
    assert len(reader) == 1


def test_a_kept_reader_does_not_keep_the_model():
    import gc
    import weakref

    model = models.llama()
    locater_penalty(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_model_that_is_gone_is_named():
    reader = ProjectionReader(models.llama())
    with pytest.raises(RuntimeError, match="keep a reference to the model"):
        reader[next(iter(reader))]
    with pytest.raises(ValueError, match="expected a model that is alive"):
        reader.refresh()
