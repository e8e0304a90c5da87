"""Fused and reference agree in values and gradients; the fused ones work under torch.compile and recomputation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from megatron_ext.ops.add_layer_norm import add_layer_norm
from megatron_ext.ops.bias_dropout_add import bias_dropout_add
from megatron_ext.ops.bias_gelu import bias_gelu
from megatron_ext.ops.cross_entropy import VocabSlice, cross_entropy
from megatron_ext.ops.kernels import Kernels, is_fused
from megatron_ext.ops.layer_norm import layer_norm
from megatron_ext.ops.softmax import causal_softmax
from megatron_ext.parallel.rng import RngStreams, default_generator, recompute

pytestmark = pytest.mark.usefixtures("fused")


@dataclass(frozen=True)
class Sample:
    """An operation with settings, and the shapes of what it takes and what gets a gradient."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., torch.Tensor]  # (inputs..., kernels=) -> result

    def inputs(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return [tensor.to(dtype).requires_grad_() for tensor in drawn]

    def run(self, inputs: list[torch.Tensor], kernels: Kernels, *, seed: int = 1) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        result = self.call(*inputs, kernels=kernels)
        upstream = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
        return (result, *torch.autograd.grad(result, inputs, upstream))


def _sum_and_norm(*arguments: torch.Tensor, dropout: float, kernels: Kernels) -> torch.Tensor:
    """Both results of add_layer_norm in one tensor; (x, x_bias or nothing, residual, weight, bias)."""
    x, *x_bias, residual, weight, bias = arguments
    norm = weight, bias, 1e-5
    pair = add_layer_norm(x, x_bias[0] if x_bias else None, residual, norm, dropout=dropout, kernels=kernels)
    return torch.stack(pair)


def _one_of_both(*arguments: torch.Tensor, which: int, kernels: Kernels) -> torch.Tensor:
    """One result; weight and bias, on which the sum does not depend, get their gradient all the same."""
    x, residual, weight, bias = arguments
    pair = add_layer_norm(x, None, residual, (weight, bias, 1e-5), dropout=0.0, kernels=kernels)
    return pair[which] if which else pair[0] + 0.0 * (weight.sum() + bias.sum())


_X, _ROW, _SCORES = (3, 5, 24), (24,), (2, 3, 5, 11)
_LABELS = torch.arange(15).view(3, 5)

SAMPLES = [
    Sample("layer_norm", (_X, _ROW, _ROW), lambda *t, kernels: layer_norm(*t, eps=1e-5, kernels=kernels)),
    Sample(
        "add_layer_norm",
        (_X, _ROW, _X, _ROW, _ROW),
        lambda *t, kernels: _sum_and_norm(*t, dropout=0.3, kernels=kernels),
    ),
    Sample(
        "add_layer_norm, no bias, no dropout",
        (_X, _X, _ROW, _ROW),
        lambda *t, kernels: _sum_and_norm(*t, dropout=0.0, kernels=kernels),
    ),
    Sample("add_layer_norm, only the norm read", (_X, _X, _ROW, _ROW), functools.partial(_one_of_both, which=1)),
    Sample("add_layer_norm, only the sum read", (_X, _X, _ROW, _ROW), functools.partial(_one_of_both, which=0)),
    Sample(
        "bias_dropout_add",
        (_X, _ROW, _X),
        lambda x, b, r, kernels: bias_dropout_add(x, b, r, dropout=0.3, kernels=kernels),
    ),
    Sample(
        "bias_dropout_add, no dropout",
        (_X, _ROW, _X),
        lambda x, b, r, kernels: bias_dropout_add(x, b, r, dropout=0.0, kernels=kernels),
    ),
    Sample(
        "bias_dropout_add, no bias, no dropout",
        (_X, _X),
        lambda x, r, kernels: bias_dropout_add(x, None, r, dropout=0.0, kernels=kernels),
    ),
    Sample("bias_gelu", (_X, _ROW), lambda x, b, kernels: bias_gelu(x, b, exact=False, kernels=kernels)),
    Sample("bias_gelu, exact, no bias", (_X,), lambda x, kernels: bias_gelu(x, None, exact=True, kernels=kernels)),
    Sample("causal_softmax", (_SCORES,), lambda s, kernels: causal_softmax(s, scale=0.4, dropout=0.3, kernels=kernels)),
    Sample(
        "causal_softmax, no dropout",
        ((3, 7, 7),),
        lambda s, kernels: causal_softmax(s, scale=0.4, dropout=0.0, kernels=kernels),
    ),
    Sample(
        "cross_entropy",
        (_X,),
        lambda x, kernels: cross_entropy(x * 1.0, _LABELS, VocabSlice(0, 20), kernels=kernels),
    ),
]


every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
_TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> None:
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        scale = other.double().abs().max().clamp(min=1.0)
        difference = float(((one.double() - other.double()) / scale).abs().max())
        assert difference <= tolerance, f"tensor {place} differs by {difference}"


@every_sample
@pytest.mark.parametrize("dtype", list(_TOLERANCE), ids=str)
def test_fused_and_reference_agree(sample: Sample, dtype: torch.dtype) -> None:
    inputs = sample.inputs(dtype)
    found, expected = sample.run(inputs, "fused"), sample.run(inputs, "reference")
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    close(found, expected, _TOLERANCE[dtype])


@every_sample
def test_float64_goes_through_the_reference(sample: Sample) -> None:
    inputs = sample.inputs(torch.float64)
    for one, other in zip(sample.run(inputs, "fused"), sample.run(inputs, "reference"), strict=True):
        assert torch.equal(one, other)
    assert not is_fused("fused", inputs[0])
    assert torch.autograd.gradcheck(lambda *t: _seeded(sample, t), inputs, fast_mode=True)


def _seeded(sample: Sample, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    torch.manual_seed(1)
    return sample.call(*tensors, kernels="reference")


@every_sample
def test_inputs_need_not_be_contiguous(sample: Sample) -> None:
    inputs = sample.inputs()
    strided = [
        (t.detach().movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else t.detach()).requires_grad_()
        for t in inputs
    ]
    assert not strided[0].is_contiguous()
    close(sample.run(strided, "fused"), sample.run(inputs, "fused"), 0.0)


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if any(len(shape) == 1 for shape in s.shapes)], ids=lambda sample: sample.name
)
def test_weights_may_be_float32_beside_half_precision(sample: Sample) -> None:
    half = sample.inputs(torch.bfloat16)
    mixed = [t.detach().float().requires_grad_() if t.dim() == 1 else t for t in half]
    found, expected = sample.run(mixed, "fused"), sample.run(half, "fused")
    assert [t.dtype for t in found[1:]] == [t.dtype for t in mixed]
    close(found, expected, 3e-2)


@every_sample
def test_compiled_in_one_graph(sample: Sample) -> None:
    # The graph that autograd and functionalization make; no code is generated.
    inputs = sample.inputs()
    torch._dynamo.reset()
    compiled: Any = torch.compile(lambda *t: sample.call(*t, kernels="fused"), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    result = compiled(*inputs)
    upstream = torch.linspace(-1, 1, result.numel()).view(result.shape)
    found = (result, *torch.autograd.grad(result, inputs, upstream))
    close(found, sample.run(inputs, "fused"), 1e-6)


@every_sample
@pytest.mark.parametrize("reentrant", [True, False])
def test_torchs_activation_checkpointing(sample: Sample, reentrant: bool) -> None:
    inputs = sample.inputs()
    torch.manual_seed(1)
    result: torch.Tensor = torch.utils.checkpoint.checkpoint(
        lambda *t: sample.call(*t, kernels="fused"), *inputs, use_reentrant=reentrant
    )
    torch.autograd.backward(result, torch.linspace(-1, 1, result.numel()).view(result.shape))
    close((result, *(t.grad for t in inputs if t.grad is not None)), sample.run(inputs, "fused"), 0.0)


@every_sample
@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_our_recomputation_draws_the_same_noise(sample: Sample, kernels: Kernels) -> None:
    first, *others = sample.inputs()
    generator = default_generator(torch.device("cpu"))
    streams = RngStreams(generator, generator.get_state())
    torch.manual_seed(1)
    result = recompute(lambda x: sample.call(x, *others, kernels=kernels), first, streams=streams)
    torch.autograd.backward(result, torch.linspace(-1, 1, result.numel()).view(result.shape))
    inputs = [first, *others]
    close((result, *(t.grad for t in inputs if t.grad is not None)), sample.run(inputs, kernels), 0.0)
