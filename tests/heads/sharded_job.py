"""Run by torchrun in two processes: weights and penalties of sharded models, saved for the test to compare."""

import copy
import os
import sys
import time
import weakref
from pathlib import Path

import models
import peft
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_qk import head_projections, locater_penalty
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.heads.sites import local_heads
from lightning_qk.metrics.spectrum import QKSpectrum
from lightning_qk.regularizers.locater import LocaterPenalty, Settings

# Three key heads: shards over two processes cut through the one in the middle.
CUT = {
    "hidden_size": 30,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "intermediate_size": 40,
    "vocab_size": models.VOCABULARY,
    "pad_token_id": 0,
}
EVEN = {**CUT, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def llama(sizes=CUT) -> nn.Module:
    return models.build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes))


def uneven_gpt2() -> nn.Module:
    """Fifteen rows: eight on one process, seven on the other."""
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=3,
        n_embd=15,
        vocab_size=models.VOCABULARY,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return models.build(transformers.GPT2LMHeadModel, config)


def qwen3() -> nn.Module:
    """With norms of queries and keys."""
    model = models.build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**CUT))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 2)
    return model


def adapted(**kwargs) -> nn.Module:
    """With PEFT adapters in its queries and keys, far from zero."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], lora_dropout=0.1, **kwargs)
    model = peft.inject_adapter_in_model(config, llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


def fsdp2(model: nn.Module, mesh, **kwargs) -> nn.Module:
    for block in blocks(model):
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def tensor_parallel(model: nn.Module, mesh) -> nn.Module:
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    for block in blocks(model):
        parallelize_module(block.self_attn, mesh, {**plan, "o_proj": RowwiseParallel()})
    return model


def fsdp1(model: nn.Module, **kwargs) -> nn.Module:
    options = {"device_id": torch.device("cpu"), "use_orig_params": True, **kwargs}
    layers = model.model.layers
    for index, block in enumerate(layers):
        layers[index] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


class Gathered:
    """How many numbers gathered weights hold at most at a time, seen at every gathering."""

    def __enter__(self):
        self.peak, self.alive, self.original = 0, [], DTensor.full_tensor
        gathered = self

        def full_tensor(tensor, **kwargs):
            whole = gathered.original(tensor, **kwargs)
            gathered.alive.append((weakref.ref(whole.untyped_storage()), whole.numel()))
            if gathered.count() > gathered.peak:
                # The thread that communicated may hold on to its output for a moment on a busy machine.
                time.sleep(0.05)
                gathered.peak = max(gathered.peak, gathered.count())
            return whole

        DTensor.full_tensor = full_tensor
        return self

    def __exit__(self, *args):
        DTensor.full_tensor = self.original

    def count(self):
        self.alive = [(ref, size) for ref, size in self.alive if ref() is not None]
        return sum(size for _, size in self.alive)


def gradients(model: nn.Module, clean=lambda name: name) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor):
            assert grad.placements == parameter.placements
            assert grad.to_local().shape == parameter.to_local().shape
            grad = grad.full_tensor()
        if grad is not None:
            found[clean(name)] = grad.detach().clone()
    return found


def plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def weights(reader) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in reader:
        head = reader[name]
        for part in ("query", "key", "query_bias", "key_bias"):
            if getattr(head, part) is not None:
                tensors[f"{plain(name)}.{part}"] = getattr(head, part).detach().clone()
    return tensors


SETTINGS = Settings("variance", "model", None, 1.0)


def compare(model: nn.Module, shard, batch: torch.Tensor) -> dict:
    """The sharded model beside the whole one: weights, penalty and gradients by both ways to apply it."""
    whole = copy.deepcopy(model)
    out = {"want": {}, "got": {}}
    for fold in (False, True):
        out["want"][f"weights{fold}"] = weights(head_projections(whole, fold_norm=fold))
    penalty = locater_penalty(whole)
    penalty.backward()
    out["want"] |= {"penalty": penalty.detach(), "loss": gradients(whole)}

    sharded = shard(model)
    for fold in (False, True):
        out["got"][f"weights{fold}"] = weights(ProjectionReader(sharded, fold_norm=fold))
    with Gathered() as live:
        penalty = locater_penalty(sharded)
    out["peak_loss"] = live.peak
    (3 * penalty).backward()
    out["got"] |= {"penalty": penalty.detach()}
    out["got"]["loss"] = {name: grad / 3 for name, grad in gradients(sharded).items()}
    # On top of gradients that are there: twice what the loss put there is left after the callback's way.
    reader = ProjectionReader(sharded)
    with Gathered() as live:
        value, reached = LocaterPenalty(reader).add_gradient(SETTINGS, 3.0, list(sharded.parameters()))
    out["peak_callback"] = live.peak
    out["got"]["callback"] = {name: grad / 6 for name, grad in gradients(sharded).items()}
    out["want"]["callback"] = out["want"]["loss"]
    out["got"]["value"], out["want"]["value"], out["reached"] = value, out["want"]["penalty"], reached
    metric = QKSpectrum({name: layer.heads for name, layer in reader.layers.items()})
    with Gathered() as live:
        metric.update(reader)
    out["peak_metric"] = live.peak
    out["got"]["spectrum"] = metric.compute()
    metric.reset()
    metric.update(head_projections(whole))
    out["want"]["spectrum"] = metric.compute()
    layer = [head for head in whole.state_dict().items() if ".0." in head[0] and "weight" in head[0]]
    out["layer"] = sum(w.numel() for name, w in layer if any(part in name for part in ("q_", "k_", "c_attn")))
    # Frozen shards are left alone; nothing but them is there to be reached.
    for parameter in sharded.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    _, out["reached_frozen"] = LocaterPenalty(reader).add_gradient(SETTINGS, 1.0, list(sharded.parameters()))
    out["frozen"] = gradients(sharded)
    return out


def heads_of(model: nn.Module, batch: torch.Tensor) -> list[tuple[int, int] | None]:
    """What `local_heads` says at each attention call."""
    found = []

    def ask(module, *_):
        part = local_heads(module, model.config.num_attention_heads)
        found.append(None if part is None else (part.start, part.stop))

    for block in blocks(model):
        block.self_attn.register_forward_pre_hook(ask)
    model(input_ids=batch)
    return found


def flat(batch: torch.Tensor) -> dict:
    """FSDP's first version."""
    model = llama(EVEN)
    whole, inputs = copy.deepcopy(model), {"input_ids": batch, "labels": batch}
    want_weights = weights(head_projections(whole))
    (whole(**inputs).loss + 3 * locater_penalty(whole)).backward()
    sharded = fsdp1(model)
    reader = ProjectionReader(sharded)  # before the first forward
    out = {"want": {"weights": want_weights}, "got": {"weights": weights(reader)}}
    sharded(**inputs).loss.backward()
    try:
        locater_penalty(sharded)
    except ValueError as error:
        out["loss_error"] = str(error)
    penalty = LocaterPenalty(ProjectionReader(sharded))
    _, out["reached"] = penalty.add_gradient(SETTINGS, 3.0, list(sharded.parameters()))
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.5)
    optimizer.step()
    torch.optim.SGD(whole.parameters(), lr=0.5).step()
    with FullyShardedDataParallel.summon_full_params(sharded):
        out["got"]["stepped"] = {plain(name): p.detach().clone() for name, p in sharded.named_parameters()}
    out["want"]["stepped"] = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for_good = fsdp1(llama(EVEN), use_orig_params=False)
    try:
        LocaterPenalty(ProjectionReader(for_good)).add_gradient(SETTINGS, 1.0, list(for_good.parameters()))
    except Exception as error:
        out["flat_error"] = f"{type(error).__name__}: {error}"
    # A part of the model does not show where the root is.
    part = fsdp1(llama(EVEN))
    try:
        ProjectionReader(part.module)
    except ValueError as error:
        out["root_error"] = str(error)
    part(**inputs)
    out["after_forward"] = len(ProjectionReader(part.module))
    return out


def run(folder: Path) -> None:
    dist.init_process_group("gloo")
    one = init_device_mesh("cpu", (2,))
    batch = torch.randint(3, models.VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    results = {}
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cases = {
        "fsdp2": (llama, lambda model: fsdp2(model, one)),
        "fsdp2 qk-norm": (qwen3, lambda model: fsdp2(model, one)),
        "fsdp2 uneven": (uneven_gpt2, lambda model: fsdp2(model, one)),
        "fsdp2 bf16": (llama, lambda model: fsdp2(model, one, mp_policy=half)),
        "fsdp2 lora": (adapted, lambda model: fsdp2(model, one)),
        "fsdp2 dora": (lambda: adapted(use_dora=True), lambda model: fsdp2(model, one)),
        "tp": (lambda: llama(EVEN), lambda model: tensor_parallel(model, one)),
    }
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
        cases[f"fsdp2 {shape[0]} x tp {shape[1]}"] = (
            lambda: llama(EVEN),
            lambda model, mesh=mesh: fsdp2(
                tensor_parallel(model, mesh["tensor_parallel"]), mesh["data_parallel"]
            ),
        )
    for name, (make, shard) in cases.items():
        torch.manual_seed(0)
        results[name] = compare(make(), shard, batch)
    for name in ("tp", "fsdp2 1 x tp 2", "fsdp2 2 x tp 1", "fsdp2"):
        results[name]["local_heads"] = heads_of(cases[name][1](cases[name][0]()), batch)
    torch.manual_seed(0)
    results["flat"] = flat(batch)
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(Path(sys.argv[1]))
