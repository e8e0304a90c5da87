"""A transformer layer in terms of our operations: what stands between matrix products and attention is fused.

Modules and parameters have megatron-core's names, so checkpoints do not depend on what computes.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ext.ops.add_layer_norm import add_layer_norm
from megatron_ext.ops.bias_dropout_add import bias_dropout_add
from megatron_ext.ops.bias_gelu import bias_gelu
from megatron_ext.ops.kernels import Kernels
from megatron_ext.ops.layer_norm import layer_norm
from megatron_ext.parallel.recompute import recompute
from megatron_ext.parallel.rng import RngStreams


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the last dimension, made as megatron-core makes its norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, *, eps: float, kernels: Kernels) -> None:
        assert not config.sequence_parallel, "the norm's gradients are not summed over tensor ranks"
        super().__init__(hidden_size, eps=eps)
        self._kernels = kernels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the shape of ``hidden`` [..., hidden_size]."""
        return layer_norm(hidden, self.weight, self.bias, eps=self.eps, kernels=self._kernels)


class AddLayerNorm(LayerNorm):
    """The LayerNorm before the MLP together with the end of the attention that it follows."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, *, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """residual + dropout(x + bias), and its norm."""
        norm = self.weight, self.bias, self.eps
        return add_layer_norm(x, bias, residual, norm, dropout=dropout, kernels=self._kernels)


class Layer(TransformerLayer):  # type: ignore[misc]
    """Pre-LayerNorm layer: attention and MLP, each with a residual connection around it."""

    def __init__(self, *args: Any, kernels: Kernels, exact_gelu: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernels: Kernels = kernels
        self._exact_gelu = exact_gelu

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_unused: object
    ) -> tuple[torch.Tensor, None]:
        """Hidden states [s, b, h] in and out; there is no context of a cross-attention."""
        dropout = self.hidden_dropout if self.training else 0.0
        attended, bias = self.self_attention(self.input_layernorm(hidden_states), attention_mask=attention_mask)
        hidden_states, normed = self.pre_mlp_layernorm(attended, bias, hidden_states, dropout=dropout)
        inner, bias = self.mlp.linear_fc1(normed)
        inner = bias_gelu(inner, bias, exact=self._exact_gelu, kernels=self._kernels)
        output, bias = self.mlp.linear_fc2(inner)
        return bias_dropout_add(output, bias, hidden_states, dropout=dropout, kernels=self._kernels), None


class RecomputedLayer(Layer):
    """A layer that keeps its input alone while training and runs again in backward."""

    def __init__(self, *args: Any, streams: RngStreams, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._streams = streams

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_unused: object
    ) -> tuple[torch.Tensor, None]:
        """As Layer.forward."""
        layer = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return layer(hidden_states, attention_mask)
        return recompute(lambda x: layer(x, attention_mask)[0], hidden_states, streams=self._streams), None
