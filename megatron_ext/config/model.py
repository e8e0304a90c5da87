"""The model and parallel sections: the shape of the GPT and its numerics, and how it is laid out over ranks."""

import math
from collections.abc import Iterator
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

    def problems(self, *, tensor: int, seq_len: int) -> Iterator[str]:
        """What contradicts: in the shape, with ``parallel.tensor``, with ``training.seq_len``."""
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            below = width // heads * heads
            values = f"{below} or {below + heads}" if below else str(heads)
            yield (
                f"model.hidden_size is {width}, which model.num_attention_heads {heads} does not divide: "
                f"write model.hidden_size {values}"
            )
        if heads % tensor:
            *smaller, largest = [str(value) for value in range(1, heads + 1) if heads % value == 0]
            divisors = f"{', '.join(smaller)} or {largest}" if smaller else largest
            yield (
                f"parallel.tensor is {tensor}, which does not divide model.num_attention_heads {heads}: "
                f"write parallel.tensor {divisors}"
            )
        if self.ffn_size % tensor:
            key = "model.ffn_hidden_size" if self.ffn_hidden_size else "4 * model.hidden_size"
            yield (
                f"parallel.tensor is {tensor}, which does not divide {key} = {self.ffn_size}: "
                f"write model.ffn_hidden_size {-(-self.ffn_size // tensor) * tensor}"
            )
        if self.padded_vocab_size % tensor:
            yield (
                f"parallel.tensor is {tensor}, which does not divide the {self.padded_vocab_size} rows of the "
                f"embedding (model.vocab_size {self.vocab_size} padded to model.vocab_multiple {self.vocab_multiple}): "
                f"write model.vocab_multiple {math.lcm(self.vocab_multiple, tensor)}"
            )
        positions = self.max_position_embeddings or seq_len
        if seq_len > positions:
            yield (
                f"training.seq_len is {seq_len}, more than model.max_position_embeddings {positions}: "
                f"write at most {positions}, or raise the positions"
            )


class ParallelConfig(Section):
    """Layout; the number of data-parallel ranks is what the launcher starts divided by ``tensor``."""

    tensor: PositiveInt = 1
    """Ranks that share one copy of the model (tensor parallel)."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO partitions over data-parallel ranks: nothing, optimizer, + gradients, + parameters."""

    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer state lives (ZeRO 1 to 3)."""

    offload_params: Literal["none", "cpu"] = "none"
    """Where parameters live between uses (ZeRO 3)."""

    micro_batch_tokens: PositiveInt | None = None
    """Tokens that one rank may hold in one forward and backward pass. Each step uses as few micro-batches as fit, so
    that short lengths run with more sequences at once; at least ``training.seq_len``, which is also the default (one
    full-length sequence)."""

    activation_checkpointing: Literal["none", "full"] = "none"
    """Recompute every layer's activations in the backward pass to save memory."""

    timeout_minutes: PositiveFloat = 30.0
    """A collective that takes longer ends the run: a rank hung or a link was cut."""

    def problems(self, *, seq_len: int, implementation: str) -> Iterator[str]:
        """What contradicts: with ``training.seq_len``, in offloading, with ``optimizer.implementation``."""
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < seq_len:
            yield (
                f"parallel.micro_batch_tokens is {self.micro_batch_tokens}, less than one sequence of training.seq_len "
                f"{seq_len}: write at least {seq_len}"
            )
        if self.offload_optimizer == "cpu" and self.zero_stage == 0:
            yield (
                'parallel.offload_optimizer is "cpu" with parallel.zero_stage 0: only ZeRO offloads; '
                "write parallel.zero_stage 1, 2 or 3"
            )
        if self.offload_params == "cpu" and self.zero_stage != 3:
            yield (
                f'parallel.offload_params is "cpu" with parallel.zero_stage {self.zero_stage}: only ZeRO 3 partitions '
                'parameters; write parallel.zero_stage 3 or parallel.offload_params "none"'
            )
        if self.offload_optimizer == "cpu" and implementation not in {"auto", "deepspeed_cpu"}:
            yield (
                f'optimizer.implementation is "{implementation}" with parallel.offload_optimizer "cpu": an offloaded '
                'optimizer steps on the CPU; write "auto" or "deepspeed_cpu"'
            )
