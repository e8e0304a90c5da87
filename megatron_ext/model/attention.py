"""Causal self-attention back ends by name: megatron-core's "core attention", between QKV and output projections."""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_ext.ops.kernels import Kernels
from megatron_ext.ops.softmax import causal_softmax
from megatron_ext.parallel.rng import RngStreams


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """Common part of the back ends: layout of the heads, and dropout from the partitioned stream.

    A tensor-parallel rank holds some of the heads, so that its attention dropout must differ from the other ranks'.
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
        """Context [s, b, heads * head] from query, key and value [s, b, heads, head]; s is 1 or more.

        Always causal: a mask argument is ignored, none is ever built.
        """
        length, batch = query.shape[:2]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.training and self._dropout > 0.0:
            with self._streams.fork():
                context = self.attend(query, key, value, dropout=self._dropout)
        else:
            context = self.attend(query, key, value, dropout=0.0)
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """Context [b, heads, s, head] from query, key and value of the same shape."""
        raise NotImplementedError


class SdpaAttention(CausalAttention):
    """torch's scaled_dot_product_attention, which picks its fastest kernel (on CPU: flash, without dropout)."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """As in the base class."""
        return functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=self._scale
        )


class FusedSoftmaxAttention(CausalAttention):
    """Matrix products around our causal softmax: memory grows with the square of the length, in the values' dtype.

    Scores are scaled inside the product, before they are rounded, so that large ones do not overflow in fp16.
    """

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """As in the base class."""
        shape = query.shape
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        scores = torch.baddbmm(query.new_empty(()), query, key.transpose(-1, -2), beta=0.0, alpha=self._scale)
        probabilities = causal_softmax(scores, scale=1.0, dropout=dropout, kernels=self._kernels)
        return torch.bmm(probabilities, value).view(shape)


class ReferenceAttention(CausalAttention):
    """softmax(Q K^T / sqrt(head)) V written out, in float32 or better. Memory grows with the square of the length."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """As in the base class."""
        length, dtype = query.shape[-2], query.dtype
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = torch.matmul(query, key.transpose(-1, -2)) * self._scale
        probabilities = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        return torch.matmul(functional.dropout(probabilities, dropout), value).to(dtype)


ATTENTION_BACKENDS: Mapping[str, type[CausalAttention]] = MappingProxyType(
    {"sdpa": SdpaAttention, "fused_softmax": FusedSoftmaxAttention, "reference": ReferenceAttention}
)


def core_attention(name: str, streams: RngStreams, kernels: Kernels = "reference") -> Callable[..., CausalAttention]:
    """Builder of the back end ``name`` (a key of ATTENTION_BACKENDS) for megatron-core's SelfAttentionSubmodules."""
    return functools.partial(ATTENTION_BACKENDS[name], streams=streams, kernels=kernels)
