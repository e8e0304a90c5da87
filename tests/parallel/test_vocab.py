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


def _expected(vocab: int, padded: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    logits, labels, weights = _case(vocab, padded, shape)
    logits.requires_grad_()
    loss = functional.cross_entropy(logits[..., :vocab].flatten(0, -2), labels.flatten(), reduction="none").view(shape)
    return loss.detach(), *torch.autograd.grad((loss * weights).sum(), logits)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vocab=st.integers(1, 40), padding=st.integers(0, 20), length=st.integers(1, 5), batch=st.integers(1, 3))
def test_equal_to_torch_on_one_rank(layout: Layout, vocab: int, padding: int, length: int, batch: int) -> None:
    logits, labels, weights = _case(vocab, vocab + padding, (length, batch))
    leaf = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf * 1.0, labels, vocab_size=vocab, layout=layout)
    found = loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaf)
    torch.testing.assert_close(found, _expected(vocab, vocab + padding, (length, batch)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_give_a_float32_loss(layout: Layout, dtype: torch.dtype) -> None:
    logits, labels, _ = _case(30, 32, (5, 2))
    leaf = logits.to(dtype).requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, labels, vocab_size=30, layout=layout)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    expected = functional.cross_entropy(logits.to(dtype).float()[..., :30].flatten(0, 1), labels.flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.mean(), expected, rtol=1e-5, atol=1e-5)
    assert gradient.dtype == dtype


def _split(_rank: int, _world_size: int, cases: list[tuple[int, int]]) -> list[tuple[torch.Tensor, ...]]:
    layout = initialize_parallel(2, 5.0)
    results: list[tuple[torch.Tensor, ...]] = []
    for vocab, padded in cases:
        logits, labels, weights = _case(vocab, padded, (4, 3))
        leaf = logits.chunk(2, dim=-1)[layout.tensor_rank].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf * 1.0, labels, vocab_size=vocab, layout=layout)
        (gradient,) = torch.autograd.grad((loss * weights).sum(), leaf)
        gathered = gather_vocab(leaf, vocab_size=vocab, layout=layout)
        # Every rank computes the same of the gathered logits.
        (own,) = torch.autograd.grad((gathered * torch.arange(1.0, vocab + 1)).sum(), leaf)
        results.append((loss.detach(), gathered.detach(), gradient, own[0, 0]))
    return results


def test_equal_to_torch_on_two_ranks_also_where_one_holds_padding_alone() -> None:
    cases = [(40, 40), (37, 40), (20, 40), (7, 40)]
    first, second = run_ranks(_split, 2, cases)
    for (vocab, padded), a, b in zip(cases, first, second, strict=True):
        expected, gradient = _expected(vocab, padded, (4, 3))
        for loss, gathered, *_ in (a, b):
            torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
            assert torch.equal(gathered, _case(vocab, padded, (4, 3))[0][..., :vocab])
        torch.testing.assert_close(torch.cat([a[2], b[2]], dim=-1), gradient, rtol=1e-10, atol=1e-10)
        assert torch.cat([a[3], b[3]]).tolist() == [*range(1, vocab + 1), *[0] * (padded - vocab)]
