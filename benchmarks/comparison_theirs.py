"""What TransformerLens and WeightWatcher make of a saved model; run by ``benchmarks/comparison.py``.

Runs in an environment of its own (``make comparison``), without lightning-qk. Prints ``RESULT`` and one line of
JSON: processor seconds of each stage, and spectra.
"""

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

seconds: dict[str, float] = {}


@contextlib.contextmanager
def timed(stage: str) -> Any:
    begin = time.process_time()
    yield
    seconds[stage] = time.process_time() - begin


def pairs(values: torch.Tensor) -> list[Any]:
    return torch.view_as_real(values.detach()).tolist()


def transformer_lens(folder: Path) -> dict[str, Any]:
    """``model.QK`` as its documentation has it: raw weights, then LayerNorm folded in and centered."""
    from transformer_lens import TransformerBridge

    with timed("load"):
        model = TransformerBridge.boot_transformers(str(folder), device="cpu")
    with timed("eigenvalues"), torch.no_grad():
        eigenvalues = model.QK.eigenvalues
    with timed("singular values"), torch.no_grad():
        singular = model.QK.S
    with timed("fold"):
        model.enable_compatibility_mode(disable_warnings=True)
    with timed("folded eigenvalues"), torch.no_grad():
        folded = model.QK.eigenvalues
    return {
        "eigenvalues": pairs(eigenvalues),
        "singular values": singular.tolist(),
        "folded eigenvalues": pairs(folded),
    }


def weightwatcher(folder: Path) -> dict[str, Any]:
    """Its empirical spectral densities: eigenvalues of ``W^T W``, of what a GPT-2 has and of its parts.

    It takes the fused ``c_attn`` for one matrix and knows no heads. To be asked for ``W_q``, ``W_k`` or the form
    of a head it has to be given them as layers, which is done here.
    """
    import weightwatcher as ww
    from transformers import GPT2LMHeadModel

    with timed("load"):
        model = GPT2LMHeadModel.from_pretrained(folder).eval()
    heads, width = model.config.n_head, model.config.n_embd
    sides, forms = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    for layer, block in enumerate(model.transformer.h):
        query, key, _ = block.attn.c_attn.weight.detach().T.split(width)
        sides[f"{layer} query"], sides[f"{layer} key"] = linear(query), linear(key)
        for head, (own_query, own_key) in enumerate(zip(query.chunk(heads), key.chunk(heads), strict=True)):
            forms[f"{layer} {head}"] = linear(own_query.T @ own_key)
    with timed("fused c_attn"):
        densities(ww, torch.nn.ModuleList(block.attn.c_attn for block in model.transformer.h))
    with timed("query and key weights"):
        found_sides = densities(ww, sides)
    with timed("forms"):
        found_forms = densities(ww, forms)
    rank = width // heads
    return {
        "query and key weights": found_sides,
        "forms": [density[:rank] for density in found_forms],  # what is beyond d_head is zero
        "forms beyond rank": max(max(density[rank:], default=0.0) for density in found_forms),
    }


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight.clone())
    return layer


def densities(ww: Any, layers: torch.nn.Module) -> list[list[float]]:
    """Eigenvalues of ``W^T W`` of each layer, in descending order, without the power-law fits."""
    watcher = ww.WeightWatcher(model=layers)
    params = {**ww.weightwatcher.DEFAULT_PARAMS, "min_evals": 1}
    # One pass over all layers: get_ESD would go through the whole model again for each.
    found = [
        watcher.apply_esd(layer, params)
        for layer in watcher.make_layer_iterator(params=params)
        if not layer.skipped
    ]
    assert len(found) == len(list(layers.children()))
    return [sorted((float(value) for value in layer.evals), reverse=True) for layer in found]


SIDES = {"transformer_lens": transformer_lens, "weightwatcher": weightwatcher}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = options.side.replace("_", "-")
    with contextlib.redirect_stdout(sys.stderr):
        spectra = SIDES[options.side](options.folder)
    versions = {package: version(package), "transformers": version("transformers")}
    print("RESULT", json.dumps({"versions": versions, "seconds": seconds, "spectra": spectra}))


if __name__ == "__main__":
    main()
