"""Fused and reference agree in values and gradients; the fused ones work under torch.compile and recomputation."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from megatron_ext.ops.kernels import Kernels, is_fused
from megatron_ext.parallel.rng import RngStreams, default_generator, recompute
from tests.ops.samples import SAMPLES, Sample

pytestmark = pytest.mark.usefixtures("fused")

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
