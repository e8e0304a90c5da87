"""What each parameter is: its kind, and whether weight decay applies to it."""

from collections.abc import Iterable
from typing import Any, Literal

import torch

ParameterKind = Literal["embedding", "positions", "attention", "mlp", "norm"]

_KINDS: tuple[tuple[str, ParameterKind], ...] = (
    ("layernorm", "norm"),
    ("position_embeddings", "positions"),
    ("word_embeddings", "embedding"),
    ("output_layer", "embedding"),
    ("self_attention", "attention"),
    ("mlp", "mlp"),
)


def parameter_kind(name: str) -> ParameterKind:
    """Kind of the parameter ``name`` (megatron-core's name); the untied output layer counts as embedding."""
    for part, kind in _KINDS:
        if part in name:
            return kind
    raise AssertionError(f"parameter {name} is of no known kind")


def is_decayed(name: str) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to biases and LayerNorm (as in Megatron-LM).

    Decided by the name, since ZeRO 3 replaces a parameter's shape while it is partitioned.
    """
    return name.endswith(".weight") and parameter_kind(name) != "norm"


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups of ``model.named_parameters()``: decayed and not decayed, in the model's order."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    return [
        {"name": "decayed", "params": [p for name, p in trained if is_decayed(name)], "weight_decay": weight_decay},
        {"name": "not_decayed", "params": [p for name, p in trained if not is_decayed(name)], "weight_decay": 0.0},
    ]


def split_dimension(name: str) -> int | None:
    """Dimension in which tensor-parallel ranks hold slices of the parameter ``name``; None where each holds all of it.

    Columns of a linear layer's output are dimension 0 of its weight. A QKV slice is a run of whole heads, since
    megatron-core keeps each head's query, key and value together.
    """
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return 1
    if any(part in name for part in ("linear_qkv.", "linear_fc1.", "word_embeddings.", "output_layer.")):
        return 0
    return None
