"""The same operation as each contestant computes it: our kernels, PyTorch, torch.compile, and other libraries."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from megatron_ext.ops import (
    adam_variance,
    add_layer_norm,
    bias_dropout_add,
    bias_gelu,
    cross_entropy,
    layer_norm,
    softmax,
)
from megatron_ext.ops.bench.traffic import Case
from megatron_ext.ops.kernels import Kernels

_EPS = 1e-5
_DROPOUT = 0.1

Inputs = tuple[torch.Tensor, ...]
Compute = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """Inputs of a case, and how many of them, from the first, get a gradient."""

    inputs: Inputs
    differentiated: int


def make_problem(case: Case, device: torch.device, generator: torch.Generator) -> Problem:
    """Random inputs of ``case`` on ``device``."""
    dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    x = normal(*case.shape)
    if case.op == "adam_variance":
        return Problem((x.square_(),), 0)
    if case.op == "cross_entropy":
        labels = torch.randint(0, case.cols, case.shape[:-1], device=device, generator=generator)
        return Problem((x, labels), 1)
    if case.op == "masked_softmax":
        batch, _, queries, keys = case.shape
        future = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)
        return Problem((x, future.expand(batch, 1, queries, keys).contiguous()), 1)
    # What the function takes beside x, by its shape.
    row, same = (case.cols,), case.shape
    others: dict[str, tuple[tuple[int, ...], ...]] = {
        "layer_norm": (row, row),
        "add_layer_norm": (row, same, row, row),
        "bias_gelu": (row,),
        "bias_dropout_add": (row, same),
        "causal_softmax": (),
    }
    return Problem((x, *(normal(*shape) for shape in others[case.op])), 1 + len(others[case.op]))


def ours(op: str, kernels: Kernels) -> Compute:
    """``op`` through our functions: fused, or the reference in plain PyTorch.

    Dropout is 0.1 in the fused contestant. The reference, whose mask is meant for comparison and not for speed, gets
    torch's own dropout instead.
    """
    if kernels == "reference":
        return _EAGER[op]
    fused: dict[str, Compute] = {
        "layer_norm": lambda x, w, b: layer_norm.layer_norm(x, w, b, eps=_EPS, kernels="fused"),
        "add_layer_norm": lambda x, xb, r, w, b: _joined(
            add_layer_norm.add_layer_norm(x, xb, r, (w, b, _EPS), dropout=_DROPOUT, kernels="fused")
        ),
        "causal_softmax": lambda x: softmax.causal_softmax(x, scale=0.125, dropout=0.0, kernels="fused"),
        "masked_softmax": lambda x, m: softmax.masked_softmax(x, m, scale=0.125, dropout=0.0, kernels="fused"),
        "bias_gelu": lambda x, b: bias_gelu.bias_gelu(x, b, exact=False, kernels="fused"),
        "bias_dropout_add": lambda x, b, r: bias_dropout_add.bias_dropout_add(
            x, b, r, dropout=_DROPOUT, kernels="fused"
        ),
        "cross_entropy": lambda x, labels: cross_entropy.cross_entropy(
            x, labels, cross_entropy.VocabSlice(0, x.shape[-1]), kernels="fused"
        ),
        "adam_variance": lambda v: adam_variance.adam_variance(v, kernels="fused"),
    }
    return fused[op]


def _joined(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Both results of add_layer_norm under one gradient: each is read by what follows."""
    return _Joined.apply(*pair)  # type: ignore[no-untyped-call,no-any-return]


class _Joined(torch.autograd.Function):
    """Stands for two readers: passes a gradient to both results, without work of its own."""

    @staticmethod
    def forward(_ctx: Any, total: torch.Tensor, _normed: torch.Tensor) -> torch.Tensor:
        return total.view_as(total)

    @staticmethod
    def backward(_ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_outputs[0], grad_outputs[0]


def _eager_add_layer_norm(
    x: torch.Tensor, x_bias: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    total = residual + torch.nn.functional.dropout(x + x_bias, _DROPOUT)
    return _joined((total, layer_norm.reference(total, weight, bias, eps=_EPS)))


_EAGER: Mapping[str, Compute] = MappingProxyType(
    {
        "layer_norm": lambda x, w, b: layer_norm.reference(x, w, b, eps=_EPS),
        "add_layer_norm": _eager_add_layer_norm,
        "causal_softmax": lambda x: softmax.causal_reference(x, scale=0.125),
        "masked_softmax": lambda x, m: softmax.masked_reference(x, m, scale=0.125),
        "bias_gelu": lambda x, b: bias_gelu.reference(x, b, exact=False),
        "bias_dropout_add": lambda x, b, r: r + torch.nn.functional.dropout(x + b, _DROPOUT),
        "cross_entropy": lambda x, labels: torch.nn.functional.cross_entropy(x.float(), labels, reduction="none"),
        "adam_variance": lambda v: torch.stack([v.sqrt().sum().double(), v.max().sqrt().double()]),
    }
)


def _apex_layer_norm() -> Compute:
    function = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return lambda x, w, b: function(x, w, b, (x.shape[-1],), _EPS)


def _apex_softmax() -> Compute:
    kernel = importlib.import_module("apex.transformer.functional.fused_softmax").ScaledUpperTriangMaskedSoftmax
    return lambda x: kernel.apply(x.flatten(0, 1), 0.125)


def _liger_layer_norm() -> Compute:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, w, b: function.apply(x, w, b, _EPS)


def _liger_cross_entropy() -> Compute:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda x, labels: function(x, labels, reduction="none")


def _flash_cross_entropy() -> Compute:
    function = importlib.import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return lambda x, labels: function(x, labels, inplace_backward=True)[0]


def _flash_layer_norm() -> Compute:
    function = importlib.import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn
    return lambda x, w, b: function(x, w, b, eps=_EPS)


_LIBRARIES: Mapping[str, Mapping[str, Callable[[], Compute]]] = MappingProxyType(
    {
        "layer_norm": {"apex": _apex_layer_norm, "liger": _liger_layer_norm, "flash-attn": _flash_layer_norm},
        "causal_softmax": {"apex": _apex_softmax},
        "cross_entropy": {"liger": _liger_cross_entropy, "flash-attn": _flash_cross_entropy},
    }
)


def contestants(op: str, *, compiled: bool) -> dict[str, Compute]:
    """Everything here that computes ``op``, by name: "fused", "torch", "compile", and libraries that are installed."""
    found = {"fused": ours(op, "fused"), "torch": ours(op, "reference")}
    if compiled:
        found["compile"] = torch.compile(ours(op, "reference"))
    for name, load in _LIBRARIES.get(op, {}).items():
        try:
            found[name] = load()
        except (ImportError, AttributeError):
            continue
    return found
