"""A run config small enough for tests, and the models made from it."""

from typing import Any

import torch

from megatron_ext.config.run import RunConfig


def small_config(
    *, tensor: int = 1, recompute: str = "none", precision: str = "fp32", seed: int = 1234, **model: Any
) -> RunConfig:
    """Two layers of width 32 with four heads; 211 tokens padded to 256; 40 positions."""
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 211,
        "max_position_embeddings": 40,
    }
    return RunConfig.model_validate(
        {
            "seed": seed,
            "model": shape | model,
            "data": {"sources": ({"prefix": "corpus"},)},
            "training": {"seq_len": 40, "batch_size": 4, "duration": {"steps": 10}, "precision": precision},
            "learning_rate": {"peak": 1e-3},
            "parallel": {"tensor": tensor, "activation_checkpointing": recompute},
        }
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
