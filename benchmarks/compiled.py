"""What a capture adds to a model of torch.compile: graphs, seconds of first steps, operators of ordinary ones.

    python benchmarks/compiled.py [--layers 6]

Prints the processor's seconds of the first step (which compiles) without a capture and with one, of the first
captured step, and of each operator on a step that is not captured.
"""

import argparse
import copy
import time
import timeit

import torch
import transformers
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.hooks.compiled import ORDER
from lightning_qk.heads.reader import find_attention


def network(layers: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=512,
        vocab_size=1000,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    inductor.compile_threads = 1
    plain = network(arguments.layers)
    heard = copy.deepcopy(plain)
    names = {module: name for name, module in find_attention(heard).items()}
    capture = AttentionCapture(names, lambda *_: None, model=heard)
    capture.install()
    tokens = torch.randint(3, 1000, (1, 128))

    def step(run: torch.nn.Module) -> float:
        start = time.process_time()
        run(input_ids=tokens, labels=tokens).loss.backward()
        return time.process_time() - start

    for title, model in (("without", plain), ("with a capture", heard)):
        before = counters["stats"]["unique_graphs"]
        run = torch.compile(model, fullgraph=True)
        first, ordinary = step(run), step(run)
        made = counters["stats"]["unique_graphs"] - before
        print(f"{title}: first step {first:.1f} s, then {ordinary:.3f} s; graphs: {made}")
    before = counters["stats"]["unique_graphs"]
    capture.enabled = True
    first = step(run)
    capture.enabled = False
    print(f"first captured step {first:.3f} s; more graphs: {counters['stats']['unique_graphs'] - before}")
    query = torch.zeros(1, 8, 16, 32)
    operators = torch.ops.lightning_qk
    form = "0;=t;=t;=t;=N;scaling=f;is_causal=T"
    for name, call in {
        "call": lambda: operators.call.default(ORDER, None, form, [query] * 3, [0.5], []),
        "enter": lambda: operators.enter.default(ORDER, None),
        "leave": lambda: operators.leave.default(ORDER),
    }.items():
        seconds = min(timeit.repeat(call, timer=time.process_time, number=5000, repeat=5)) / 5000
        print(f"{name}: {seconds * 1e6:.1f} µs where nothing is captured")
    capture.remove()


if __name__ == "__main__":
    main()
