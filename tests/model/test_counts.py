"""Counts against totals that others published, against formulas written out by hand, and against the built model."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.model.counts import (
    count_parameters,
    estimate_memory,
    full_length_flops,
    run_flops,
    step_flops,
)
from megatron_ext.model.gpt import build_gpt
from megatron_ext.ops.kernels import Kernels
from megatron_ext.parallel.groups import Layout


def model(layers: int, width: int, heads: int, **more: Any) -> ModelConfig:
    return ModelConfig(num_layers=layers, hidden_size=width, num_attention_heads=heads, **more)


def run(shape: dict[str, Any], *, precision: str = "fp32", seq_len: int = 128, **parallel: Any) -> RunConfig:
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "model": shape,
                "data": {"sources": [{"prefix": "corpus"}]},
                "training": {
                    "seq_len": seq_len,
                    "batch_size": 4,
                    "duration": {"steps": 10},
                    "precision": precision,
                },
                "learning_rate": {"peak": 1e-3},
                "parallel": parallel,
            }
        )
    )


@pytest.mark.parametrize(
    ("shape", "total"),
    [
        ((12, 768, 12), 124_439_808),
        ((24, 1024, 16), 354_823_168),
        ((36, 1280, 20), 774_030_080),
        ((48, 1600, 25), 1_557_611_200),
    ],
)
def test_gpt2_sizes_are_those_of_the_released_models(shape: tuple[int, int, int], total: int) -> None:
    assert count_parameters(model(*shape, vocab_multiple=1), positions=1024).total == total


def test_gpt3_is_175_billion() -> None:
    assert count_parameters(model(96, 12288, 96), positions=2048).total == pytest.approx(175e9, rel=0.005)


def test_padding_and_an_untied_output_layer_are_rows_of_the_vocabulary() -> None:
    tied = count_parameters(model(2, 64, 4, vocab_size=1000, vocab_multiple=1), positions=32)
    padded = count_parameters(model(2, 64, 4, vocab_size=1000, vocab_multiple=128), positions=32)
    untied = count_parameters(model(2, 64, 4, vocab_size=1000, vocab_multiple=1, tie_embeddings=False), positions=32)
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
    config = run(
        {
            "num_layers": 2,
            "hidden_size": 48,
            "num_attention_heads": 4,
            "ffn_hidden_size": 80,
            "vocab_size": 211,
            "max_position_embeddings": 150,
            "tie_embeddings": tied,
        }
    )
    built = sum(parameter.numel() for parameter in build_gpt(config, layout).parameters())
    assert built == count_parameters(config.model, positions=150).total


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

    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 250, "attention": "reference"}
    config = run(shape, seq_len=32)
    tokens = torch.zeros(3, 32, dtype=torch.int64)
    gpt = build_gpt(config, layout)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens).sum().backward()
    assert counter.get_total_flops() == step_flops(config.model, batch_size=3, seq_len=32)


def test_run_flops_sum_the_steps_at_their_lengths() -> None:
    content = run({"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}).model_dump(mode="json")
    content["curriculum"] = {"pacing": "linear", "start": 8, "duration": {"steps": 7}}
    config = RunConfig.model_validate_json(json.dumps(content))
    plan = config.plan()
    by_step = [step_flops(config.model, batch_size=step.batch_size, seq_len=step.seq_len) for step in plan]
    assert run_flops(config.model, plan.segments) == sum(by_step)
    baseline = full_length_flops(config.model, tokens=plan.tokens, seq_len=plan.seq_len)
    steps_at_full_length = plan.tokens / (4 * 128)
    assert baseline == pytest.approx(
        steps_at_full_length * step_flops(config.model, batch_size=4, seq_len=128), rel=1e-12
    )
    assert sum(by_step) < baseline


GPT2 = {"num_layers": 48, "hidden_size": 1600, "num_attention_heads": 25}
PARAMETERS = 1_557_686_400  # with the vocabulary padded to 50,304


@pytest.mark.parametrize(
    ("precision", "parallel", "bytes_a_parameter"),
    [
        ("fp32", {"zero_stage": 0}, (4, 4, 8)),
        ("bf16", {"zero_stage": 0}, (2, 6, 12)),
        ("bf16", {"zero_stage": 1}, (2, 4, 12 / 8)),
        ("bf16", {"zero_stage": 2}, (2, 4 / 8, 12 / 8)),
        ("fp32", {"zero_stage": 2}, (4, 4 / 8, 12 / 8)),
    ],
)
def test_model_states_by_zero_stage(
    precision: str, parallel: dict[str, Any], bytes_a_parameter: tuple[float, float, float]
) -> None:
    memory = estimate_memory(run(GPT2, precision=precision, seq_len=1024, **parallel), data_size=8)
    found = (memory.weights, memory.gradients, memory.optimizer)
    assert found == pytest.approx(tuple(PARAMETERS * amount for amount in bytes_a_parameter), rel=1e-8)
    assert memory.host == 0


def test_zero_3_shards_the_weights_and_gathers_at_most_a_billion() -> None:
    memory = estimate_memory(run(GPT2, precision="bf16", seq_len=1024, zero_stage=3), data_size=8)
    assert memory.weights == pytest.approx(2 * PARAMETERS / 8 + 2e9, rel=1e-8)


def test_offloading_moves_bytes_to_the_host() -> None:
    here = estimate_memory(run(GPT2, precision="bf16", seq_len=1024, zero_stage=3), data_size=8)
    away = estimate_memory(
        run(GPT2, precision="bf16", seq_len=1024, zero_stage=3, offload_optimizer="cpu", offload_params="cpu"),
        data_size=8,
    )
    assert away.optimizer == 0
    assert away.host == here.optimizer + (here.weights - 2 * 10**9)
    assert away.device + away.host == here.device


def test_activations_grow_with_the_micro_batch_in_whole_sequences() -> None:
    one, same, two = (
        estimate_memory(run(GPT2, seq_len=1024, micro_batch_tokens=tokens), data_size=1)
        for tokens in (1024, 2047, 2048)
    )
    assert one == same
    assert two.activations == 2 * one.activations
    assert two.logits == 2 * one.logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("attention", "kernels"), [("sdpa", "reference"), ("reference", "reference"), ("fused_softmax", "fused")]
)
def test_activations_are_what_autograd_keeps(
    layout: Layout, request: pytest.FixtureRequest, attention: str, kernels: Kernels, precision: str
) -> None:
    if kernels == "fused":
        request.getfixturevalue("fused")
    shape = {
        "num_layers": 6,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "attention": attention,
        "kernels": kernels,
    }
    config = run(shape, precision=precision, micro_batch_tokens=512)
    gpt = build_gpt(config, layout, kernels=kernels).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, 512, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = gpt(tokens, tokens).sum()
    softmax = 4 * 512 * 512 if kernels == "reference" else estimate_memory(config, data_size=1).logits
    found = sum(storage.nbytes() for storage in kept.values()) - softmax
    assert loss.requires_grad
    assert estimate_memory(config, data_size=1).activations == pytest.approx(found, rel=0.03)


def test_checkpointing_keeps_one_layer_and_the_inputs() -> None:
    plain = estimate_memory(run(GPT2, seq_len=1024), data_size=1)
    less = estimate_memory(run(GPT2, seq_len=1024, activation_checkpointing="full"), data_size=1)
    inputs = 48 * 1024 * 1600 * 4
    ends = 3 * 1024 * 1600 * 4
    layer = (plain.activations - ends) // 48
    assert less.activations == inputs + layer + ends


def test_importing_it_leaves_torch_alone() -> None:
    code = "import sys, megatron_ext.model.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
