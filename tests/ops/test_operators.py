"""The operators as torch sees them: schemas, fakes, devices; and what they say about unfit arguments."""

import re
from typing import Any

import pytest
import torch
from torch.library import opcheck

pytestmark = pytest.mark.usefixtures("fused")

X, ROW, SEED = torch.randn(3, 5, 16), torch.randn(16), torch.tensor([-5])
SCORES, STATISTICS = torch.randn(2, 3, 5, 7), torch.ones(15)
LABELS = torch.zeros(3, 5, dtype=torch.int64)

CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("layer_norm_forward", (X, ROW, ROW, 1e-5)),
    ("layer_norm_backward", (X, X, ROW, STATISTICS, STATISTICS)),
    ("add_layer_norm_forward", (X, ROW, X, ROW, ROW, 0.3, SEED, 1e-5)),
    ("add_layer_norm_forward", (X, None, X, ROW, ROW, 0.0, None, 1e-5)),
    ("add_layer_norm_backward", (X, X, X, ROW, STATISTICS, STATISTICS, True, 0.3, SEED)),
    ("add_layer_norm_backward", (X, None, X, ROW, STATISTICS, STATISTICS, False, 0.0, None)),
    ("bias_dropout_add_forward", (X, ROW, X, 0.3, SEED)),
    ("bias_dropout_add_backward", (X, ROW, 0.3, SEED)),
    ("bias_dropout_add_backward", (X, ROW, 0.0, None)),
    ("bias_gelu_forward", (X, ROW, False)),
    ("bias_gelu_backward", (X, X, ROW, True)),
    ("bias_gelu_backward", (X, X, None, False)),
    ("causal_softmax_forward", (SCORES, 0.5, 0.3, SEED)),
    ("causal_softmax_forward", (SCORES, 0.5, 0.0, None)),
    ("causal_softmax_backward", (SCORES, SCORES, 0.5, 0.0, None)),
    ("cross_entropy_forward", (X, LABELS, 0, 12)),
    ("cross_entropy_backward_", (X, LABELS, STATISTICS, STATISTICS, STATISTICS, 0, 12)),
    ("adam_variance", (X.square(),)),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_check_of_an_operator(name: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    wide = {id(STATISTICS)}
    taken = tuple(
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() and id(a) not in wide else a
        for a in arguments
    )
    opcheck(getattr(torch.ops.megatron_ext, name).default, taken)


def test_every_operator_is_checked_here() -> None:
    registered = {
        str(schema.name).removeprefix("megatron_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("megatron_ext::")
    }
    assert registered == {name for name, _ in CALLS}


WIDE, OTHER = torch.randn(3, 5, 17), torch.randn(16, dtype=torch.bfloat16)

UNFIT: list[tuple[str, tuple[Any, ...], str]] = [
    ("layer_norm_forward", (X.double(), ROW, ROW, 1e-5), "x is float64, must be float32, float16 or bfloat16"),
    ("layer_norm_forward", (X.transpose(0, 1), ROW, ROW, 1e-5), "x is not contiguous; pass x.contiguous()"),
    ("layer_norm_forward", (X[:0], ROW, ROW, 1e-5), "x has no elements"),
    ("layer_norm_forward", (WIDE, ROW, ROW, 1e-5), "weight has 16 elements, must have 17"),
    ("layer_norm_forward", (X, OTHER, OTHER, 1e-5), "weight is bfloat16, must be float32 or as x"),
    ("layer_norm_forward", (X, ROW, OTHER, 1e-5), "bias is bfloat16, must be float32"),
    ("layer_norm_backward", (X, X, ROW, STATISTICS[1:], STATISTICS), "mean has 14 elements, must have 15"),
    ("layer_norm_backward", (X, WIDE, ROW, STATISTICS, STATISTICS), "x has size 17 in dimension 2"),
    ("bias_dropout_add_forward", (X, ROW, X[0], 0.0, None), "residual has 2 dimensions, must have 3"),
    ("bias_dropout_add_forward", (X, ROW, X.half(), 0.0, None), "residual is float16, must be float32"),
    ("bias_dropout_add_forward", (X, ROW, X, 0.5, None), "dropout is 0.5 and there is no seed"),
    ("bias_dropout_add_forward", (X, ROW, X, 1.0, SEED), "dropout is 1, must be 0 or more and below 1"),
    ("bias_dropout_add_forward", (X, ROW, X, 0.5, SEED.int()), "seed is int32, must be int64"),
    ("causal_softmax_forward", (torch.randn(4, 3), 1.0, 0.0, None), "4 queries and 3 keys"),
    ("cross_entropy_forward", (X, LABELS[:2], 0, 12), "labels has 10 elements, must have 15"),
    ("cross_entropy_forward", (X, LABELS, 0, 17), "real is 17, must be from 0 to 16"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), UNFIT, ids=[message for _, _, message in UNFIT])
def test_unfit_arguments_are_named(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"megatron_ext::{name}: .*{re.escape(message)}"):
        getattr(torch.ops.megatron_ext, name)(*arguments)
