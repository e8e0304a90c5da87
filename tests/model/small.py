"""A model small enough for tests, its inputs, and weights that hide no mistake."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.model.gpt import Gpt, Recomputation, build_gpt
from megatron_ext.parallel.groups import Layout
from megatron_ext.parallel.rng import RngStreams

POSITIONS = 40


def small_model(**model: Any) -> ModelConfig:
    """Two layers of width 32 with four heads; 211 tokens padded to 256."""
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 211}
    return ModelConfig(**shape | model)


def build_small(
    layout: Layout,
    *,
    seed: int = 1234,
    positions: int = POSITIONS,
    recompute: Recomputation = "none",
    streams: RngStreams | None = None,
    **model: Any,
) -> Gpt:
    """The model of ``small_model``; 40 positions."""
    return build_gpt(
        small_model(**model),
        layout=layout,
        positions=positions,
        seed=seed,
        activation_checkpointing=recompute,
        streams=streams,
    )


def random_tokens(batch: int, length: int, *, vocab: int = 211, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def shake(model: torch.nn.Module, seed: int = 5) -> None:
    """Replace every parameter by larger random numbers: at initialization biases and norms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(center + 0.15 * torch.randn(parameter.shape, generator=generator))


def gradients_of(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of ``loss`` by the names of ``model``'s parameters."""
    model.zero_grad()
    torch.autograd.backward(loss)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_identical(actual: Any, expected: Any) -> None:
    """Tensors, or sequences and mappings of them, are equal bit for bit (a NaN to nothing)."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@contextmanager
def keeping(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage, by address, that autograd keeps of what runs inside, without the model's parameters."""
    kept: dict[int, torch.UntypedStorage] = {}
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Held, so that no address is used twice.
            kept[storage.data_ptr()] = storage
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield sizes
