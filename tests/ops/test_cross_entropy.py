"""Memory of the fused cross-entropy, who may read its logits, and slices of a vocabulary."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.ops.cross_entropy import Statistics, VocabSlice, cross_entropy, reference

pytestmark = pytest.mark.usefixtures("fused")


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of storages that operations inside have made and that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))


TOKENS, VOCABULARY = 64, 50257


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_logits_size_is_made_beside_them(dtype: torch.dtype) -> None:
    hidden = torch.randn(TOKENS, 8).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 8).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))

    def step() -> None:
        logits = torch.nn.functional.linear(hidden, weight)
        torch.autograd.backward(cross_entropy(logits, labels, VocabSlice(0, VOCABULARY), kernels="fused").sum())

    with PeakBytes() as used:
        step()
    logits = TOKENS * VOCABULARY * dtype.itemsize
    assert logits <= used.peak < 1.05 * logits + 3 * weight.nbytes
    with PeakBytes() as more:
        losses = reference(torch.nn.functional.linear(hidden, weight), labels, VocabSlice(0, VOCABULARY))
        torch.autograd.backward(losses.sum())
    assert more.peak > 1.9 * logits, "the count would not notice a second tensor"


def test_a_second_reader_of_the_logits_is_refused() -> None:
    logits = torch.randn(4, 9, requires_grad=True) * 1.0
    labels = torch.tensor([0, 1, 2, 3])
    # Backward goes through what came later first.
    squares = logits.square().sum()
    both = squares + cross_entropy(logits, labels, VocabSlice(0, 9), kernels="fused").sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(both)


def test_a_second_backward_pass_is_refused() -> None:
    logits = torch.randn(4, 9, requires_grad=True) * 1.0
    loss = cross_entropy(logits, torch.tensor([0, 1, 2, 3]), VocabSlice(0, 9), kernels="fused").sum()
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def whole(parts: list[Statistics]) -> Statistics:
    """Statistics over all slices."""
    maximum = torch.stack([part.maximum for part in parts]).amax(0)
    total = sum((part.total * (part.maximum - maximum).exp() for part in parts), torch.zeros_like(maximum))
    return Statistics(maximum, total, torch.stack([part.target for part in parts]).sum(0))


@settings(max_examples=25)
@given(ranks=st.integers(1, 4), rows=st.integers(1, 20), vocab=st.integers(1, 60), tokens=st.integers(1, 5))
def test_slices_give_what_the_whole_gives_whatever_the_padding(ranks: int, rows: int, vocab: int, tokens: int) -> None:
    vocab = min(vocab, ranks * rows)
    logits = torch.randn(tokens, ranks * rows, generator=torch.Generator().manual_seed(rows))
    logits[0, 0] = 80.0
    labels = torch.arange(tokens) % vocab
    exact = logits.double().requires_grad_()
    expected = reference(exact, labels, VocabSlice(0, vocab))
    (gradient,) = torch.autograd.grad(expected.sum(), exact)

    forward: Callable[..., tuple[torch.Tensor, ...]] = torch.ops.megatron_ext.cross_entropy_forward
    places = [(r * rows, max(0, min(rows, vocab - r * rows))) for r in range(ranks)]
    slices = [logits[:, first : first + rows].clone() for first, _ in places]
    together = whole([Statistics(*forward(s, labels, *place)) for s, place in zip(slices, places, strict=True)])
    for part, (first, real) in zip(slices, places, strict=True):
        leaf = part.requires_grad_()
        losses = cross_entropy(leaf, labels, VocabSlice(first, real, lambda _own: together), kernels="fused")
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        (found,) = torch.autograd.grad(losses.sum(), leaf)
        torch.testing.assert_close(found.double(), gradient[:, first : first + rows], rtol=1e-5, atol=1e-6)
