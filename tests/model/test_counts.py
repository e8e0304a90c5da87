"""Counts against totals that others published, against formulas written out by hand, and against the built model."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.model import ModelConfig, ParallelConfig
from megatron_ext.curriculum.segments import Segment
from megatron_ext.model.counts import (
    MemoryEstimate,
    count_parameters,
    estimate_memory,
    full_length_flops,
    run_flops,
    step_flops,
)
from megatron_ext.model.gpt import build_gpt
from megatron_ext.ops.kernels import Kernels
from megatron_ext.parallel.groups import Layout
from tests.model.small import keeping

Precision = Literal["fp32", "bf16"]


def model(layers: int, width: int, heads: int, **more: Any) -> ModelConfig:
    return ModelConfig(num_layers=layers, hidden_size=width, num_attention_heads=heads, **more)


def memory(
    shape: ModelConfig, *, precision: Precision = "fp32", seq_len: int = 1024, data_size: int = 8, **parallel: Any
) -> MemoryEstimate:
    sizes = {"positions": seq_len, "seq_len": seq_len, "data_size": data_size}
    return estimate_memory(shape, ParallelConfig(**parallel), precision=precision, **sizes)


def test_sizes_are_those_of_the_released_models() -> None:
    shapes = ((12, 768, 12), (24, 1024, 16), (36, 1280, 20), (48, 1600, 25))
    totals = [count_parameters(model(*shape, vocab_multiple=1), positions=1024).total for shape in shapes]
    assert totals == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    assert count_parameters(model(96, 12288, 96), positions=2048).total == pytest.approx(175e9, rel=0.005)  # GPT-3


def test_padding_and_an_untied_output_layer_are_rows_of_the_vocabulary() -> None:
    tied, padded, untied = (
        count_parameters(model(2, 64, 4, vocab_size=1000, vocab_multiple=multiple, tie_embeddings=ties), positions=32)
        for multiple, ties in ((1, True), (128, True), (1, False))
    )
    assert padded.total - tied.total == 24 * 64
    assert untied.total - tied.total == 1000 * 64
    assert tied.position_embeddings == 32 * 64
    assert tied.final_norm == 2 * 64


def test_a_tensor_rank_s_parts_add_up_to_the_model_with_the_whole_parts_repeated() -> None:
    shape = model(3, 64, 4, ffn_hidden_size=192, vocab_size=1024)
    whole, part = count_parameters(shape, positions=32), count_parameters(shape, positions=32, tensor=2)
    repeated = 32 * 64 + 2 * 64 + 3 * (64 + 64 + 4 * 64)  # positions, final norm, output biases, norms
    assert 2 * part.total == whole.total + repeated


@pytest.mark.parametrize("tied", [True, False])
def test_the_built_model_has_as_many_parameters(layout: Layout, tied: bool) -> None:
    shape = model(2, 48, 4, ffn_hidden_size=80, vocab_size=211, tie_embeddings=tied)
    gpt = build_gpt(shape, layout=layout, positions=150, seed=1)
    built = sum(parameter.numel() for parameter in gpt.parameters())
    assert built == count_parameters(shape, positions=150).total


def products(shape: ModelConfig, length: int, *, causal: bool) -> int:
    """Multiply-adds of one sequence's forward pass, matrix by matrix."""
    h, f = shape.hidden_size, shape.ffn_size
    heads, head = shape.num_attention_heads, h // shape.num_attention_heads
    total = 0
    for _ in range(shape.num_layers):
        total += length * h * 3 * h + length * h * h
        for query in range(length):
            keys = query + 1 if causal else length
            total += 2 * heads * keys * head
        total += 2 * length * h * f
    return total + length * h * shape.padded_vocab_size


@settings(deadline=None, max_examples=40)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 4),
    head=st.integers(1, 16),
    ffn=st.integers(1, 64),
    batch=st.integers(1, 8),
    length=st.integers(1, 40),
    causal=st.booleans(),
)
def test_flops_are_six_per_multiply_add(
    *, layers: int, heads: int, head: int, ffn: int, batch: int, length: int, causal: bool
) -> None:
    shape = model(layers, heads * head, heads, ffn_hidden_size=ffn, vocab_size=100)
    expected = 6 * batch * products(shape, length, causal=causal)
    assert step_flops(shape, batch_size=batch, seq_len=length, causal=causal) == expected


def test_flops_agree_with_megatron_lm_s_published_formula() -> None:
    """96 B s l h^2 (1 + s / 6h + V / 16lh) with recomputation, of which 3/4 are the model's (logits aside)."""
    layers, h, s = 24, 1024, 1024
    shape = model(layers, h, 16)
    published = 72 * 8 * s * layers * h * h * (1 + s / (6 * h)) + 6 * 8 * s * h * shape.padded_vocab_size
    assert step_flops(shape, batch_size=8, seq_len=s) == pytest.approx(published, rel=1e-12)


def test_the_forward_pass_runs_as_many_flops(layout: Layout) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = model(2, 64, 4, vocab_size=250, attention="reference")
    tokens = torch.zeros(3, 32, dtype=torch.int64)
    gpt = build_gpt(shape, layout=layout, positions=32, seed=1)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens).sum().backward()
    assert counter.get_total_flops() == step_flops(shape, batch_size=3, seq_len=32)


def test_run_flops_sum_the_steps_at_their_lengths() -> None:
    shape, runs = model(2, 64, 4), [(5, 4, 8), (2, 4, 64), (3, 8, 128)]
    segments = [Segment(0, steps, batch_size, seq_len, 0, 0) for steps, batch_size, seq_len in runs]
    lengths = [(batch_size, seq_len) for steps, batch_size, seq_len in runs for _ in range(steps)]
    by_step = [step_flops(shape, batch_size=batch, seq_len=length) for batch, length in lengths]
    assert run_flops(shape, segments) == sum(by_step)
    tokens = sum(batch * length for batch, length in lengths)
    baseline = full_length_flops(shape, tokens=tokens, seq_len=128)
    assert baseline == pytest.approx(tokens / 128 * step_flops(shape, batch_size=1, seq_len=128), rel=1e-12)
    assert sum(by_step) < baseline


GPT2_XL = model(48, 1600, 25)
PARAMETERS = 1_557_686_400  # with the vocabulary padded to 50,304


@pytest.mark.parametrize(
    ("precision", "zero_stage", "bytes_a_parameter"),
    [
        ("fp32", 0, (4, 4, 8)),
        ("bf16", 0, (2, 6, 12)),
        ("bf16", 1, (2, 4, 12 / 8)),
        ("bf16", 2, (2, 4 / 8, 12 / 8)),
        ("fp32", 2, (4, 4 / 8, 12 / 8)),
    ],
)
def test_model_states_by_zero_stage(
    precision: Precision, zero_stage: int, bytes_a_parameter: tuple[float, float, float]
) -> None:
    found = memory(GPT2_XL, precision=precision, zero_stage=zero_stage)
    states = (found.weights, found.gradients, found.optimizer)
    assert states == pytest.approx(tuple(PARAMETERS * amount for amount in bytes_a_parameter), rel=1e-8)
    assert found.host == 0


def test_zero_3_shards_the_weights_and_gathers_at_most_a_billion_and_offloading_moves_bytes_to_the_host() -> None:
    here = memory(GPT2_XL, precision="bf16", zero_stage=3)
    assert here.weights == pytest.approx(2 * PARAMETERS / 8 + 2e9, rel=1e-8)
    away = memory(GPT2_XL, precision="bf16", zero_stage=3, offload_optimizer="cpu", offload_params="cpu")
    assert away.optimizer == 0
    assert away.host == here.optimizer + (here.weights - 2 * 10**9)
    assert away.device + away.host == here.device


def test_activations_grow_with_the_micro_batch_in_whole_sequences() -> None:
    one, same, two = (memory(GPT2_XL, micro_batch_tokens=tokens) for tokens in (1024, 2047, 2048))
    assert memory(GPT2_XL) == one == same
    assert two.activations == 2 * one.activations
    assert two.logits == 2 * one.logits


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(
    ("attention", "kernels"),
    [
        ("sdpa", "reference"),
        ("reference", "reference"),
        pytest.param("fused_softmax", "fused", marks=pytest.mark.kernels),
    ],
)
def test_activations_are_what_autograd_keeps(
    *,
    layout: Layout,
    request: pytest.FixtureRequest,
    attention: str,
    kernels: Kernels,
    precision: Precision,
    dtype: torch.dtype,
) -> None:
    if kernels == "fused":
        request.getfixturevalue("fused")
    shape = model(6, 128, 4, vocab_size=512, attention=attention, kernels=kernels)
    expected = memory(shape, precision=precision, seq_len=128, data_size=1, micro_batch_tokens=512)
    gpt = build_gpt(shape, layout=layout, positions=128, seed=1, kernels=kernels).to(dtype)
    tokens = torch.randint(0, 512, (4, 128))
    with keeping(gpt) as kept:
        loss = gpt(tokens, tokens).sum()
    softmax = 4 * 512 * 512 if kernels == "reference" else expected.logits
    found = sum(kept.values()) - softmax
    assert loss.requires_grad
    assert expected.activations == pytest.approx(found, rel=0.03)


def test_checkpointing_keeps_one_layer_and_the_inputs() -> None:
    plain, less = (memory(GPT2_XL, activation_checkpointing=kind) for kind in ("none", "full"))
    inputs = 48 * 1024 * 1600 * 4
    ends = 3 * 1024 * 1600 * 4
    layer = (plain.activations - ends) // 48
    assert less.activations == inputs + layer + ends
