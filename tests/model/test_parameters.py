"""Kinds and decay groups cover every parameter once."""

import pytest
import torch

from megatron_ext.model.parameters import is_decayed, parameter_groups, parameter_kind
from megatron_ext.parallel.groups import Layout
from tests.model.small import build_small


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_vectors_do_not(layout: Layout, tied: bool) -> None:
    model = build_small(layout, tie_embeddings=tied)
    decayed, kept = parameter_groups(model.named_parameters(), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in kept["params"])
    grouped = [id(parameter) for group in (decayed, kept) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    torch.optim.AdamW([decayed, kept], lr=1e-3)


def test_kinds(layout: Layout) -> None:
    model = build_small(layout, tie_embeddings=False, num_layers=1)
    kinds: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        kinds.setdefault(parameter_kind(name), set()).add(name.removeprefix("decoder.layers.0."))
    assert kinds == {
        "embedding": {"embedding.word_embeddings.weight", "output_layer.weight"},
        "positions": {"embedding.position_embeddings.weight"},
        "attention": {f"self_attention.linear_{m}.{p}" for m in ("qkv", "proj") for p in ("weight", "bias")},
        "mlp": {f"mlp.linear_{m}.{p}" for m in ("fc1", "fc2") for p in ("weight", "bias")},
        "norm": {f"{m}_layernorm.{p}" for m in ("input", "pre_mlp") for p in ("weight", "bias")}
        | {f"decoder.final_layernorm.{p}" for p in ("weight", "bias")},
    }


def test_frozen_parameters_are_in_no_group_and_unknown_names_are_bugs(layout: Layout) -> None:
    model = build_small(layout)
    model.embedding.position_embeddings.weight.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1
    with pytest.raises(AssertionError, match="router"):
        is_decayed("router.weight")
