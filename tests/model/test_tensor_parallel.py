"""Two tensor ranks compute what one computes; dropout agrees and differs between ranks where it must."""

from typing import Any

import pytest
import torch

from megatron_ext.model.parameters import parameter_kind, split_dimension
from megatron_ext.parallel.groups import initialize_parallel
from tests.model.small import assert_identical, build_small, gradients_of, random_tokens, small_model
from tests.ranks import run_ranks

Tensors = dict[str, torch.Tensor]

_VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention": "reference", "tie_embeddings": False},
    {"recompute": "full", "activation": "gelu_erf"},
    # The second rank's half of the vocabulary is padding alone.
    {"vocab_size": 100, "vocab_multiple": 256},
]


def _compute(
    _rank: int, _world: int, tensor: int, variants: list[dict[str, Any]]
) -> list[tuple[Tensors, Tensors, Tensors]]:
    layout = initialize_parallel(tensor, 5.0)
    results = []
    for variant in variants:
        model = build_small(layout, **variant)
        initial = {name: t.clone() for name, t in model.state_dict().items()}
        # Ten times the initial weights, so that attention and MLP count for something; no bias stays zero.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
                if name.endswith("bias"):
                    parameter.add_(0.1)
        vocab = variant.get("vocab_size", small_model().vocab_size)
        tokens, labels = random_tokens(3, 19, vocab=vocab), random_tokens(3, 19, vocab=vocab, seed=1)
        losses = model(tokens, labels)
        gradients = gradients_of(model, losses.mean())
        outputs = {"losses": losses.detach(), "logits": model(tokens).detach()}
        outputs["last"] = model(tokens, last_only=True).detach()
        results.append((initial, outputs, gradients))
    return results


def _merge(first: Tensors, second: Tensors) -> Tensors:
    """The tensors of both ranks put together; those that are not split must be the same on both."""
    merged = {}
    for name, tensor in first.items():
        dimension = split_dimension(name)
        if dimension is None:
            assert_identical(tensor, second[name])
        merged[name] = tensor if dimension is None else torch.cat([tensor, second[name]], dim=dimension)
    return merged


def test_two_ranks_equal_one() -> None:
    (single,) = run_ranks(_compute, 1, 1, _VARIANTS)
    first, second = run_ranks(_compute, 2, 2, _VARIANTS)
    for (initial, outputs, gradients), a, b in zip(single, first, second, strict=True):
        assert_identical(_merge(a[0], b[0]), initial)
        assert_identical(a[1], b[1])
        torch.testing.assert_close(a[1], outputs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(_merge(a[2], b[2]), gradients, rtol=1e-3, atol=1e-5)


def _flags(_rank: int, _world: int) -> dict[str, tuple[bool, int | None]]:
    from deepspeed.runtime.utils import is_model_parallel_parameter

    model = build_small(initialize_parallel(2, 5.0), tie_embeddings=False)
    return {
        name: (
            is_model_parallel_parameter(p),
            getattr(p, "partition_dim", None) if is_model_parallel_parameter(p) else None,
        )
        for name, p in model.named_parameters()
    }


def test_deepspeed_and_megatron_see_the_same_parameters_split() -> None:
    for name, (split, dimension) in run_ranks(_flags, 2)[0].items():
        assert split == (split_dimension(name) is not None), name
        assert dimension == split_dimension(name), name


def _dropout(_rank: int, _world: int, rates: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    model = build_small(initialize_parallel(2, 5.0), recompute="full", **rates)
    query = torch.ones(9, 1, 2, 8)
    # The same input on all ranks: what differs is the mask.
    context = model.decoder.layers[0].self_attention.core_attention(
        query, query, torch.eye(9)[:, None, None, :8] + query
    )
    tokens = random_tokens(2, 30)
    losses = model(tokens, tokens)
    return context.detach(), losses.detach(), gradients_of(model, losses.mean())


@pytest.mark.parametrize(
    ("rates", "drops_attention"),
    [({"hidden_dropout": 0.3}, False), ({"attention_dropout": 0.3, "hidden_dropout": 0.1}, True)],
    ids=str,
)
def test_dropout_over_two_copies_of_two_ranks(rates: dict[str, Any], drops_attention: bool) -> None:
    contexts, losses, gradients = zip(*run_ranks(_dropout, 4, rates), strict=True)
    for first, second in ((0, 1), (2, 3)):
        # One model copy: what both hold in full is equal, forward and backward.
        assert torch.equal(losses[first], losses[second])
        for name, gradient in gradients[first].items():
            if parameter_kind(name) in ("norm", "positions") or name.endswith(("proj.bias", "fc2.bias")):
                assert_identical(gradient, gradients[second][name])
        assert torch.equal(contexts[first], contexts[second]) != drops_attention
    assert not torch.equal(losses[0], losses[2])
    assert torch.equal(contexts[0], contexts[2]) != drops_attention
