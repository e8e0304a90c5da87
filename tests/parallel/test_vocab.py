"""The split cross-entropy is torch's on the real vocabulary; padding takes no part."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from megatron_ext.parallel.groups import Layout, initialize_parallel
from megatron_ext.parallel.vocab import gather_vocab, vocab_parallel_cross_entropy
from tests.ranks import run_ranks


def _case(vocab: int, padded: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab * 1000 + padded)
    logits = 3 * torch.randn(*shape, padded, dtype=torch.float64, generator=generator)
    # The largest logit is a padding id's: it would dominate if it counted.
    logits[..., vocab:] = 50.0
    labels = torch.randint(0, vocab, shape, generator=generator)
    return logits, labels, torch.rand(shape, dtype=torch.float64, generator=generator)


def _expected(vocab: int, padded: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels, weights = _case(vocab, padded, shape)
    logits.requires_grad_()
    loss = functional.cross_entropy(logits[..., :vocab].flatten(0, -2), labels.flatten(), reduction="none").view(shape)
    torch.autograd.backward((loss * weights).sum())
    assert logits.grad is not None
    return loss.detach(), logits.grad


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vocab=st.integers(1, 40), padding=st.integers(0, 20), length=st.integers(1, 5), batch=st.integers(1, 3))
def test_equal_to_torch_on_one_rank(layout: Layout, vocab: int, padding: int, length: int, batch: int) -> None:
    logits, labels, weights = _case(vocab, vocab + padding, (length, batch))
    leaf = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf * 1.0, labels, vocab_size=vocab, layout=layout)
    torch.autograd.backward((loss * weights).sum())
    expected, gradient = _expected(vocab, vocab + padding, (length, batch))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_give_a_float32_loss(layout: Layout, dtype: torch.dtype) -> None:
    logits, labels, _ = _case(30, 32, (5, 2))
    leaf = logits.to(dtype).requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, labels, vocab_size=30, layout=layout)
    torch.autograd.backward(loss.sum())
    expected = functional.cross_entropy(logits.to(dtype).float()[..., :30].flatten(0, 1), labels.flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.mean(), expected, rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype


def _split(_rank: int, _world_size: int, cases: list[tuple[int, int]]) -> list[tuple[torch.Tensor, ...]]:
    layout = initialize_parallel(2, 5.0)
    results: list[tuple[torch.Tensor, ...]] = []
    for vocab, padded in cases:
        logits, labels, weights = _case(vocab, padded, (4, 3))
        leaf = logits.chunk(2, dim=-1)[layout.tensor_rank].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf * 1.0, labels, vocab_size=vocab, layout=layout)
        torch.autograd.backward((loss * weights).sum())
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad, gather_vocab(leaf.detach(), vocab_size=vocab, layout=layout)))
    return results


def test_equal_to_torch_on_two_ranks_also_where_one_holds_padding_alone() -> None:
    cases = [(40, 40), (37, 40), (20, 40), (7, 40)]
    first, second = run_ranks(_split, 2, cases)
    for (vocab, padded), a, b in zip(cases, first, second, strict=True):
        loss, gradient = _expected(vocab, padded, (4, 3))
        for rank in (a, b):
            torch.testing.assert_close(rank[0], loss, rtol=1e-10, atol=1e-10)
            assert torch.equal(rank[2], _case(vocab, padded, (4, 3))[0][..., :vocab])
        torch.testing.assert_close(torch.cat([a[1], b[1]], dim=-1), gradient, rtol=1e-10, atol=1e-10)


def _gather_gradient(_rank: int, _world_size: int) -> torch.Tensor:
    layout = initialize_parallel(2, 5.0)
    part = torch.arange(4.0).chunk(2)[layout.tensor_rank].clone().requires_grad_()
    torch.autograd.backward((gather_vocab(part, vocab_size=3, layout=layout) * torch.tensor([1.0, 2.0, 3.0])).sum())
    assert part.grad is not None
    return part.grad


def test_the_gradient_of_gathered_logits_is_each_ranks_slice() -> None:
    first, second = run_ranks(_gather_gradient, 2)
    assert first.tolist() == [1.0, 2.0]
    assert second.tolist() == [3.0, 0.0]
