"""A transformer layer: attention back ends by name, and our operations between megatron-core's matrix products.

Modules and parameters have megatron-core's names, so that checkpoints do not depend on what computes. Shapes: s
positions, b sequences, h the hidden size, f the MLP's width, t tensor ranks, a the attention heads of this tensor rank,
d the width of a head.
"""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_ext.ops.add_layer_norm import add_layer_norm
from megatron_ext.ops.bias_dropout_add import bias_dropout_add
from megatron_ext.ops.bias_gelu import bias_gelu
from megatron_ext.ops.kernels import Kernels
from megatron_ext.ops.layer_norm import layer_norm
from megatron_ext.ops.softmax import causal_softmax
from megatron_ext.parallel.rng import RngStreams, recompute


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """Common part of the back ends: megatron-core's "core attention", between QKV and output projections.

    A tensor rank holds some of the heads, so that its attention dropout must differ from the other ranks': it draws
    from the partitioned stream.
    """

    def __init__(
        self, config: TransformerConfig, *, streams: RngStreams, kernels: Kernels = "reference", **_unused: object
    ) -> None:
        super().__init__(config=config)
        self._streams = streams
        self._kernels = kernels
        self._scale = 1.0 / math.sqrt(config.kv_channels)
        self._dropout = float(config.attention_dropout)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_mask: object, **_unused: object
    ) -> torch.Tensor:
        """Context [s, b, a * d] from query, key and value [s, b, a, d]; s is 1 or more.

        Always causal: a mask argument is ignored, none is ever built.
        """
        length, batch = query.shape[:2]
        # Each head's sequence is one matrix: [s, b, a, d] -> [b, a, s, d], a view.
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.training and self._dropout > 0.0:
            with self._streams.fork():
                context = self.attend(query, key, value, dropout=self._dropout)
        else:
            context = self.attend(query, key, value, dropout=0.0)
        # Heads side by side again: [b, a, s, d] -> [s, b, a, d] -> [s, b, a * d].
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """Context [b, a, s, d] from query, key and value of the same shape."""
        raise NotImplementedError


class SdpaAttention(CausalAttention):
    """torch's scaled_dot_product_attention, which picks its fastest kernel (on CPU: flash, without dropout)."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """As in the base class."""
        return functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=self._scale
        )


class FusedSoftmaxAttention(CausalAttention):
    """Matrix products around our causal softmax: memory grows with the square of the length, in the values' dtype."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """As in the base class."""
        shape = query.shape
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # [b * a, s, d]
        # Scaled inside the product, before rounding, so that large scores [b * a, s, s] do not overflow in fp16.
        scores = torch.baddbmm(query.new_empty(()), query, key.transpose(-1, -2), beta=0.0, alpha=self._scale)
        probabilities = causal_softmax(scores, scale=1.0, dropout=dropout, kernels=self._kernels)
        return torch.bmm(probabilities, value).view(shape)


class ReferenceAttention(CausalAttention):
    """softmax(Q K^T / sqrt(d)) V written out, in float32 or better. Memory grows with the square of the length."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """As in the base class."""
        length, dtype = query.shape[-2], query.dtype
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
        # Position i sees 0..i: [s, s], true above the diagonal.
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = torch.matmul(query, key.transpose(-1, -2)) * self._scale  # [b, a, s, s]
        probabilities = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        return torch.matmul(functional.dropout(probabilities, dropout), value).to(dtype)


ATTENTION_BACKENDS: Mapping[str, type[CausalAttention]] = MappingProxyType(
    {"sdpa": SdpaAttention, "fused_softmax": FusedSoftmaxAttention, "reference": ReferenceAttention}
)


def core_attention(name: str, streams: RngStreams, kernels: Kernels = "reference") -> Callable[..., CausalAttention]:
    """Builder of the back end ``name`` (a key of ATTENTION_BACKENDS) for megatron-core's SelfAttentionSubmodules."""
    return functools.partial(ATTENTION_BACKENDS[name], streams=streams, kernels=kernels)


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the last dimension, made as megatron-core makes its norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, *, eps: float, kernels: Kernels) -> None:
        assert not config.sequence_parallel, "the norm's gradients are not summed over tensor ranks"
        super().__init__(hidden_size, eps=eps)
        self._kernels = kernels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the shape of ``hidden`` [..., h]."""
        return layer_norm(hidden, self.weight, self.bias, eps=self.eps, kernels=self._kernels)


class AddLayerNorm(LayerNorm):
    """The LayerNorm before the MLP together with the end of the attention that it follows."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, *, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """residual + dropout(x + bias), and its norm; all [..., h]."""
        norm = self.weight, self.bias, self.eps
        return add_layer_norm(x, bias, residual, norm, dropout=dropout, kernels=self._kernels)


class Mlp(torch.nn.Module):
    """The two matrices of the MLP; a tensor rank holds f / t columns of the first and rows of the second."""

    def __init__(self, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        # Both leave adding their bias to the operation after them.
        common = {"config": config, "bias": True, "skip_bias_add": True, "tp_group": group}
        self.linear_fc1 = ColumnParallelLinear(
            width, inner, init_method=config.init_method, gather_output=False, **common
        )
        self.linear_fc2 = RowParallelLinear(
            inner, width, init_method=config.output_layer_init_method, input_is_parallel=True, **common
        )


class Layer(MegatronModule):  # type: ignore[misc]
    """Pre-LayerNorm layer: attention and MLP, each with a residual connection around it.

    With ``recompute_streams``, the streams that its dropout draws from, it keeps its input alone while training and
    runs again in backward. megatron-core's TransformerBlock makes it and gives it ``config``, number and groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        core_attention: Callable[..., CausalAttention],
        exact_gelu: bool,
        kernels: Kernels,
        recompute_streams: RngStreams | None,
        **_unused: object,
    ) -> None:
        super().__init__(config=config)
        self._kernels: Kernels = kernels
        self._recompute_streams = recompute_streams
        self._dropout = config.hidden_dropout
        self._exact_gelu = exact_gelu
        # In the order in which initial weights are drawn, as in megatron-core's TransformerLayer.
        norm = {"eps": config.layernorm_epsilon, "kernels": kernels}
        self.input_layernorm = LayerNorm(config, config.hidden_size, **norm)
        self.self_attention = SelfAttention(
            config,
            SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear, core_attention=core_attention, linear_proj=RowParallelLinear
            ),
            layer_number,
            AttnMaskType.causal,
            pg_collection=pg_collection,
        )
        self.pre_mlp_layernorm = AddLayerNorm(config, config.hidden_size, **norm)
        self.mlp = Mlp(config, pg_collection.tp)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_unused: object
    ) -> tuple[torch.Tensor, None]:
        """Hidden states [s, b, h] in and out; there is no context of a cross-attention."""
        assert attention_mask is None, "attention is causal without a mask"
        if self._recompute_streams is not None and self.training and torch.is_grad_enabled():
            return recompute(self._transform, hidden_states, streams=self._recompute_streams), None
        return self._transform(hidden_states), None

    def _transform(self, hidden: torch.Tensor) -> torch.Tensor:
        dropout = self._dropout if self.training else 0.0

        # x + dropout(attention(norm(x)) + bias). The output projection leaves its bias [h] to the operation that also
        # drops, adds the residual and normalizes for the MLP: one pass over [s, b, h] instead of four.
        attended, bias = self.self_attention(self.input_layernorm(hidden), attention_mask=None)
        hidden, normed = self.pre_mlp_layernorm(attended, bias, hidden, dropout=dropout)

        # x + dropout(W2 gelu(W1 norm(x) + b1) + b2): [s, b, h] -> [s, b, f / t] -> [s, b, h], summed over tensor ranks.
        inner, bias = self.mlp.linear_fc1(normed)
        inner = bias_gelu(inner, bias, exact=self._exact_gelu, kernels=self._kernels)
        output, bias = self.mlp.linear_fc2(inner)
        return bias_dropout_add(output, bias, hidden, dropout=dropout, kernels=self._kernels)
