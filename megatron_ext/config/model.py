"""The model section: the shape of the GPT and its numerics."""

from typing import Literal

from megatron_ext.base import PositiveFloat, PositiveInt, Probability, Section


class ModelConfig(Section):
    """A GPT-2/GPT-3 decoder: learned positions, pre-LayerNorm, GELU, tied embeddings."""

    num_layers: PositiveInt
    """Transformer layers."""

    hidden_size: PositiveInt
    """Width of the residual stream; divisible by ``num_attention_heads``."""

    num_attention_heads: PositiveInt
    """Attention heads; divisible by ``parallel.tensor``."""

    ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP's inner layer; by default four times ``hidden_size``."""

    vocab_size: PositiveInt = 50257
    """Token ids that the tokenizer can produce."""

    vocab_multiple: PositiveInt = 128
    """The embedding is padded to a multiple of this (Tensor Cores; divisible by ``parallel.tensor``). Padding ids get
    no probability."""

    max_position_embeddings: PositiveInt | None = None
    """Rows of the learned position table; by default ``training.seq_len``."""

    activation: Literal["gelu_tanh", "gelu_erf"] = "gelu_tanh"
    """GELU in GPT-2's tanh approximation, or exact."""

    tie_embeddings: bool = True
    """Share the input embedding with the output layer, as GPT-2 and GPT-3 do."""

    hidden_dropout: Probability = 0.0
    """Dropout after the embedding, the attention and the MLP (GPT-2: 0.1, GPT-3: 0)."""

    attention_dropout: Probability = 0.0
    """Dropout of the attention probabilities (GPT-2: 0.1, GPT-3: 0)."""

    layernorm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in every LayerNorm."""

    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections are scaled by 1/sqrt(2 * num_layers)."""

    attention: Literal["sdpa", "fused_softmax", "reference"] = "sdpa"
    """Attention back end: torch's scaled_dot_product_attention; matrix products around our causal softmax; or the same
    written out in float32."""

    kernels: Literal["auto", "fused", "reference"] = "auto"
    """LayerNorm, bias+GELU, bias+dropout+residual, the softmax of ``fused_softmax`` and cross-entropy: compiled from
    our sources (built at first use), PyTorch's own, or (auto) the first where it can be had. Both compute the same up
    to rounding, with the same dropout; may be changed when a run is continued."""

    @property
    def ffn_size(self) -> int:
        """Width of the MLP's inner layer with the default filled in."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: ``vocab_size`` rounded up to ``vocab_multiple``."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
