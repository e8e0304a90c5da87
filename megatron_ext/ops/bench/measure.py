"""How long an operation takes as each implementation computes it: our kernels, PyTorch, torch.compile, other libraries.

They take turns, so that a machine that slows down slows all of them; each works on another set of buffers every time,
of which there are so many that no cache still holds the set when its turn comes again. Times are medians: of a GPU's
own clock between events; on a CPU, of CPU seconds divided by torch's threads, which other programs disturb least.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
from megatron_ext.ops.bench.figures import FUSED, Case, Measured, traffic
from megatron_ext.ops.kernels import Kernels
from megatron_ext.runtime.device import Device, mark, seconds_between

_EPS = 1e-5
_DROPOUT = 0.1

Compute = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """Tensors that an operation takes, and how many of them, from the first, get a gradient."""

    tensors: tuple[torch.Tensor, ...]
    differentiated: int


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Random inputs of ``case`` on ``device``."""
    dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    x = normal(*case.shape)
    if case.op == "adam_variance":
        return Inputs((x.square_(),), 0)
    if case.op == "cross_entropy":
        labels = torch.randint(0, case.cols, case.shape[:-1], device=device, generator=generator)
        return Inputs((x, labels), 1)
    # What the function takes beside x, by its shape.
    row, same = (case.cols,), case.shape
    others: dict[str, tuple[tuple[int, ...], ...]] = {
        "layer_norm": (row, row),
        "add_layer_norm": (row, same, row, row),
        "bias_gelu": (row,),
        "bias_dropout_add": (row, same),
        "causal_softmax": (),
    }
    return Inputs((x, *(normal(*shape) for shape in others[case.op])), 1 + len(others[case.op]))


def ours(op: str, kernels: Kernels) -> Compute:
    """``op`` through our functions: fused, or the reference in plain PyTorch.

    Dropout is 0.1 in the fused one. The reference, whose mask is meant for comparison and not for speed, gets
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
        "causal_softmax": lambda x: softmax.reference(x, scale=0.125),
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


def implementations(op: str, *, compiled: bool) -> dict[str, Compute]:
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


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 7  # of which the median is taken
    seconds: float = 0.1  # of an implementation in a round, at least one call
    cold_bytes: int = 2**29  # buffers of all sets together; one set where a single one is larger
    compiled: bool = True  # whether torch.compile takes part


def measure(case: Case, device: Device, effort: Effort) -> Measured:
    """Time every implementation of ``case``, forward, and forward with backward."""
    generator = torch.Generator(device.torch_device).manual_seed(1)
    moved = traffic(case).forward
    sets = [
        make_inputs(case, device.torch_device, generator)
        for _ in range(max(1, min(64, effort.cold_bytes // max(1, moved))))
    ]
    failures: dict[str, str] = {}
    runs = implementations(case.op, compiled=effort.compiled)
    forward = _timed({name: _forward(run, sets) for name, run in runs.items()}, device, effort, failures)
    both: Mapping[str, float] = {}
    if sets[0].differentiated:
        left = {name: _both(run, sets) for name, run in runs.items() if name in forward}
        both = _timed(left, device, effort, failures)
    return Measured(case, forward, both, failures)


def copy_rate(device: Device, effort: Effort) -> float:
    """Bytes a second, read and written, of a copy that no cache helps."""
    source = torch.empty(effort.cold_bytes // 2, dtype=torch.uint8, device=device.torch_device).fill_(1)
    target = torch.empty_like(source)
    seconds = _timed({FUSED: lambda _: target.copy_(source)}, device, effort, {})[FUSED]
    return 2 * source.numel() / seconds


Call = Callable[[int], object]
"""Computes once, on the set of buffers of that number."""


def _forward(run: Compute, sets: Sequence[Inputs]) -> Call:
    def call(turn: int) -> object:
        with torch.no_grad():
            return run(*sets[turn % len(sets)].tensors)

    return call


def _both(run: Compute, sets: Sequence[Inputs]) -> Call:
    grads: dict[int, torch.Tensor] = {}

    def call(turn: int) -> object:
        given = sets[turn % len(sets)]
        leaves = [tensor.detach().requires_grad_() for tensor in given.tensors[: given.differentiated]]
        result = run(*leaves, *given.tensors[given.differentiated :])
        grad = grads.setdefault(turn % len(sets), torch.randn_like(result))
        return torch.autograd.grad(result, leaves, grad.to(result.dtype), allow_unused=True)

    return call


def _timed(calls: Mapping[str, Call], device: Device, effort: Effort, failures: dict[str, str]) -> dict[str, float]:
    """Median seconds of a call of each; those that raise are put into ``failures`` and left out."""
    counts: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call(0)
            one = _seconds(call, range(1, 3), device)
        except Exception as error:
            if name == FUSED:
                raise
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        counts[name] = max(1, int(effort.seconds / max(one, 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in counts}
    turn = 3
    for _ in range(effort.rounds):
        for name, count in counts.items():
            taken[name].append(_seconds(calls[name], range(turn, turn + count), device))
            turn += count
    return {name: statistics.median(values) for name, values in taken.items()}


def _seconds(call: Call, turns: range, device: Device) -> float:
    """Mean seconds of the calls of ``turns``."""
    if not device.is_gpu:
        start = time.process_time()
        for turn in turns:
            call(turn)
        return (time.process_time() - start) / len(turns) / torch.get_num_threads()
    first = mark(device)
    for turn in turns:
        call(turn)
    last = mark(device)
    device.wait()
    return seconds_between(first, last) / len(turns)
