"""The model on one rank: initialization, padding, causality, dropout, recomputation, precision, state dict."""

import math
from dataclasses import astuple
from typing import Any, get_args

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.model.gpt import Recomputation
from megatron_ext.parallel.groups import Layout
from tests.model.small import assert_identical, build_small, gradients_of, keeping, random_tokens, shake


@pytest.mark.parametrize("tied", [True, False])
def test_initial_loss_is_the_log_of_the_vocabulary(layout: Layout, tied: bool) -> None:
    model = build_small(layout, vocab_size=5000, hidden_size=64, tie_embeddings=tied)
    with torch.no_grad():
        losses = model(random_tokens(20, 40, vocab=5000), random_tokens(20, 40, vocab=5000, seed=1))
    assert losses.shape == (20, 40)
    assert losses.dtype == torch.float32
    assert float(losses.mean()) == pytest.approx(math.log(5000), rel=0.01)


def test_initialization_is_gpt2s(layout: Layout) -> None:
    model = build_small(layout, hidden_size=128, num_layers=8, init_std=0.03, vocab_size=2000, positions=300)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "layernorm" in name:
            assert bool((parameter == 1).all()), name
        else:
            scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.03 / math.sqrt(2 * 8) if scaled else 0.03
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.03), name
            assert abs(float(parameter.detach().mean())) < 0.03 * std, name


def test_weights_follow_the_seed_and_building_draws_from_no_stream(layout: Layout) -> None:
    model = build_small(layout, seed=1)
    # Not where a build with this seed ends.
    torch.rand(3)
    before = model.streams.snapshot()
    again = build_small(layout, seed=1, streams=model.streams)
    assert torch.equal(model.streams.snapshot().replicated, before.replicated)
    other = build_small(layout, seed=2, streams=model.streams)
    weights = [m.state_dict()["decoder.layers.1.mlp.linear_fc1.weight"] for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_changes_nothing(layout: Layout, tied: bool) -> None:
    tokens, labels = random_tokens(2, 9), random_tokens(2, 9, seed=1)
    exact = build_small(layout, vocab_multiple=1, tie_embeddings=tied)
    padded = build_small(layout, vocab_multiple=512, tie_embeddings=tied)
    shake(padded)
    state = padded.state_dict()
    exact.load_state_dict({name: t[:211] if len(t) == 512 else t for name, t in state.items()})
    assert padded(tokens).shape == (2, 9, 211)
    torch.testing.assert_close(padded(tokens), exact(tokens), rtol=1e-5, atol=1e-5)
    losses = [model(tokens, labels) for model in (padded, exact)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    expected, found = gradients_of(exact, losses[1].mean()), gradients_of(padded, losses[0].mean())
    for name, gradient in found.items():
        if len(gradient) == 512:
            assert not gradient[211:].any(), name
            found[name] = gradient[:211]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_no_position_sees_a_later_one(layout: Layout, backend: str) -> None:
    model = build_small(layout, attention=backend)
    shake(model)
    tokens = random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7] = (tokens[:, 7] + 1) % 211
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_recomputation_is_bitwise_equal_and_leaves_the_streams_equal(layout: Layout, backend: str) -> None:
    tokens, labels = random_tokens(3, 21), random_tokens(3, 21, seed=1)
    rates: dict[str, Any] = {"hidden_dropout": 0.2, "attention_dropout": 0.3}
    results = []
    for recompute in get_args(Recomputation):
        model = build_small(layout, recompute=recompute, attention=backend, **rates)
        shake(model)
        losses = model(tokens, labels)
        results.append((losses.detach(), gradients_of(model, losses.mean()), astuple(model.streams.snapshot())))
    assert_identical(results[1], results[0])


def test_recomputation_keeps_fewer_tensors(layout: Layout) -> None:
    sizes = {}
    for recompute in get_args(Recomputation):
        model = build_small(layout, recompute=recompute, num_layers=6)
        with keeping(model) as kept:
            loss = model(random_tokens(2, 40), random_tokens(2, 40))
        sizes[recompute] = sum(kept.values())
        del loss
    assert sizes["full"] < 0.5 * sizes["none"]


def test_dropout_is_off_in_evaluation_and_restored_by_the_rng_state(layout: Layout) -> None:
    model = build_small(layout, hidden_dropout=0.2, attention_dropout=0.2)
    tokens = random_tokens(2, 20)
    state = model.streams.rng_state()
    first, second = model(tokens, tokens), model(tokens, tokens)
    assert not torch.equal(first, second)
    model.streams.set_rng_state(state)
    assert_identical((model(tokens, tokens), model(tokens, tokens)), (first, second))
    model.eval()
    assert torch.equal(model(tokens, tokens), model(tokens, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_half_precision_is_close_to_float32(
    layout: Layout, dtype: torch.dtype, backend: str, recompute: Recomputation
) -> None:
    tokens, labels = random_tokens(4, 33), random_tokens(4, 33, seed=1)
    full, half = (build_small(layout, attention=backend, recompute=recompute) for _ in range(2))
    half.to(dtype)
    losses, half_losses = full(tokens, labels), half(tokens, labels)
    assert half_losses.dtype == torch.float32
    assert half(tokens).dtype == dtype
    torch.testing.assert_close(half_losses, losses, rtol=0, atol=0.02)
    scale = 128.0
    gradients, half_gradients = gradients_of(full, losses.mean()), gradients_of(half, scale * half_losses.mean())
    assert gradients.keys() == half_gradients.keys()
    for name, gradient in gradients.items():
        assert half_gradients[name].dtype == dtype
        error = (half_gradients[name].float() / scale - gradient).norm() / gradient.norm()
        assert float(error) < (0.02 if dtype == torch.float16 else 0.05), name


def test_the_state_dict_holds_tensors_only_and_loads_strictly(layout: Layout) -> None:
    model, other = (build_small(layout, seed=seed) for seed in (1, 2))
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state.keys() == dict(model.named_parameters()).keys()
    other.load_state_dict(state, strict=True)
    tokens = random_tokens(1, 8)
    assert torch.equal(other(tokens), model(tokens))
    with pytest.raises(UserError, match=r"41 tokens.*max_position_embeddings is 40"):
        model(random_tokens(1, 41))
    del state["decoder.final_layernorm.bias"]
    with pytest.raises(RuntimeError, match=r"decoder\.final_layernorm\.bias"):
        other.load_state_dict(state, strict=True)
