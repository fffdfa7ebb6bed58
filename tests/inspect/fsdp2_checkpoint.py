"""Run by two processes: one model, sharded by FSDP2, saved by torch.distributed.checkpoint."""

import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

source, target = map(Path, sys.argv[1:])
dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(source)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=target)
dist.destroy_process_group()
