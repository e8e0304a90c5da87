"""What a GPT costs, from its config alone: parameters, FLOPs, memory. Imports no torch.

Notation: n layers of width h with an MLP of width f, V rows of the (padded) vocabulary, S rows of the position table,
B sequences of length L.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from megatron_ext.config.model import ModelConfig, ParallelConfig
from megatron_ext.curriculum.segments import Segment


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model, or of one tensor-parallel rank's part of it."""

    word_embeddings: int
    """V * h; also the output layer when embeddings are tied."""

    position_embeddings: int
    """S * h."""

    layers: int
    """n * (4h^2 + 2hf + 9h + f): attention, MLP, their biases, and two LayerNorms each."""

    final_norm: int
    """2h."""

    output_layer: int
    """V * h of an untied output layer, otherwise 0."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


def count_parameters(model: ModelConfig, *, positions: int, tensor: int = 1) -> ParameterCount:
    """Parameters held by each of ``tensor`` tensor-parallel ranks; all of the model's with ``tensor`` 1.

    As in Megatron-LM, embeddings and the output layer are split by rows of the vocabulary; the QKV and first MLP matrix
    by columns, with their biases; the attention's output and second MLP matrix by rows, without theirs. Position table
    and LayerNorms are whole on every rank.
    """
    h, f = model.hidden_size, model.ffn_size
    vocabulary = model.padded_vocab_size // tensor * h
    split = (3 * h * h + 3 * h) + h * h + (h * f + f) + f * h
    whole = h + h + 2 * (2 * h)
    return ParameterCount(
        word_embeddings=vocabulary,
        position_embeddings=positions * h,
        layers=model.num_layers * (split // tensor + whole),
        final_norm=2 * h,
        output_layer=0 if model.tie_embeddings else vocabulary,
    )


def step_flops(model: ModelConfig, *, batch_size: int, seq_len: int, causal: bool = False) -> int:
    """Floating-point operations of forward and backward over ``batch_size`` sequences of ``seq_len`` tokens.

    Matrix products only, a multiplication and an addition as two operations; the backward pass counts twice the
    forward:

        3 * B * (2 L (n (4h^2 + 2hf) + Vh) + 4 n h P)

    with P the (query, key) pairs of one head's attention: L^2 by the full convention, L (L + 1) / 2 by the causal one,
    which counts only the pairs that the mask leaves. Model FLOPs utilization here uses the full convention, as PaLM
    (appendix B) and Megatron-LM (Narayanan et al. 2021, section 5.1) do. Activations computed a second time by
    checkpointing are not counted in either: they are work of the machine, not of the model.
    """
    h, f = model.hidden_size, model.ffn_size
    per_token = 2 * (model.num_layers * (4 * h * h + 2 * h * f) + model.padded_vocab_size * h)
    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len * seq_len
    return 3 * batch_size * (seq_len * per_token + 4 * model.num_layers * h * pairs)


def run_flops(model: ModelConfig, segments: Sequence[Segment], *, causal: bool = False) -> int:
    """FLOPs of a whole run, each segment at its own length."""
    return sum(
        segment.steps * step_flops(model, batch_size=segment.batch_size, seq_len=segment.seq_len, causal=causal)
        for segment in segments
    )


def full_length_flops(model: ModelConfig, *, tokens: int, seq_len: int, causal: bool = False) -> int:
    """FLOPs of the same number of tokens, all at the full length (rounded down to a whole number)."""
    return tokens * step_flops(model, batch_size=1, seq_len=seq_len, causal=causal) // seq_len


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. An estimate: no allocator overhead, no communication buffers, no library contexts."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    host: int
    """What offloading moves to the host's memory; not part of ``device``."""

    @property
    def device(self) -> int:
        """What the rank's device holds at the peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


_MAX_LIVE_PARAMETERS = 1_000_000_000


def estimate_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    precision: Literal["fp32", "bf16", "fp16"],
    positions: int,
    seq_len: int,
    data_size: int,
) -> MemoryEstimate:
    """Peak memory of one rank of ``data_size`` data-parallel ranks (times ``parallel.tensor``).

    With P the rank's parameters (its tensor-parallel part), d = ``data_size`` and w the bytes of a value (fp32 4, bf16
    and fp16 2):

        weights     w P; under ZeRO 3 w P / d, and on top the parameters gathered at a time: min(P, 1e9) w, DeepSpeed's
                    default ``stage3_max_live_parameters``
        gradients   4 P, fp32 or accumulated in fp32; half precision without ZeRO 2 P and an fp32 copy of 4 P in the
                    update; / d from ZeRO 2 on
        optimizer   8 P for Adam's moments and 4 P for the fp32 copy of the weights that DeepSpeed keeps (fp32 without
                    ZeRO has none); / d from ZeRO 1 on
        activations and logits of one micro-batch of ``parallel.micro_batch_tokens`` at ``seq_len``, the full length:
                    see below

    What ``model.kernels`` "auto" comes to is not known here; it counts as "reference", which takes more.
    Offloaded parts (the optimizer, or the ZeRO 3 share of the weights) are counted under ``host``.
    Sources: ZeRO (Rajbhandari et al. 2020, section 3.1); DeepSpeed's ZeRO and BF16 optimizers for the fp32 copies.
    """
    stage, is_fp32 = parallel.zero_stage, precision == "fp32"
    width = 4 if is_fp32 else 2
    parameters = count_parameters(model, positions=positions, tensor=parallel.tensor).total
    share = -(-parameters // data_size)

    weights = width * (share if stage == 3 else parameters)
    gathered = width * min(parameters, _MAX_LIVE_PARAMETERS) if stage == 3 else 0
    gradients = (4 if is_fp32 or stage else 6) * (share if stage >= 2 else parameters)
    optimizer = (8 if is_fp32 and not stage else 12) * (share if stage else parameters)
    offloads_optimizer = parallel.offload_optimizer == "cpu" and stage >= 1
    offloads_weights = parallel.offload_params == "cpu" and stage == 3

    # A micro-batch holds whole sequences.
    tokens = max(1, (parallel.micro_batch_tokens or seq_len) // seq_len) * seq_len
    return MemoryEstimate(
        weights=gathered + (0 if offloads_weights else weights),
        gradients=gradients,
        optimizer=0 if offloads_optimizer else optimizer,
        activations=tokens * _activations(model, parallel, seq_len=seq_len, width=width),
        logits=tokens * _logits(model, parallel, width=width),
        host=(optimizer if offloads_optimizer else 0) + (weights if offloads_weights else 0),
    )


def _activations(model: ModelConfig, parallel: ParallelConfig, *, seq_len: int, width: int) -> int:
    """Bytes per token of a micro-batch that the layers keep for the backward pass.

    Per layer, with t tensor-parallel ranks, a heads, and w bytes a value (Korthikanti et al. 2022, equation 2, taken
    apart so that each term can be left out):

        w (4h + (4h + 2f) / t)  inputs of the two LayerNorms, of QKV and the first MLP matrix; Q, K, V and the inputs
                                of the attention's output matrix, of GELU and the second MLP matrix
        2h                      masks of the hidden dropout, one byte each, where there is one; fused kernels draw
                                them again
        4 a / t                 sdpa keeps one fp32 logarithm per head and query
        w a L / t               fused_softmax keeps probabilities, and as much again with attention dropout
        4 a L / t               the reference attention keeps fp32 probabilities,
        3 (4 - w) h / t         Q, K, V in fp32 instead of w bytes,
        5 a L / t               and, with attention dropout, its result and mask

    A mask takes one byte a value on GPUs; on CPUs as many as the value, and there sdpa with attention dropout falls
    back to keeping probabilities, which is not counted.

    With full checkpointing each layer keeps its input, w h, and one layer at a time the above. The embedding's and the
    final LayerNorm's outputs add 3 w h (one more mask with dropout).
    """
    h, heads, tensor = model.hidden_size, model.num_attention_heads, parallel.tensor
    masks = h if model.hidden_dropout else 0
    layer = width * (4 * h + (4 * h + 2 * model.ffn_size) // tensor)
    layer += 2 * masks if model.kernels != "fused" else 0
    if model.attention == "sdpa":
        layer += 4 * heads // tensor
    elif model.attention == "fused_softmax":
        layer += width * (2 if model.attention_dropout else 1) * heads * seq_len // tensor
    else:
        kept = 9 if model.attention_dropout else 4
        layer += (kept * heads * seq_len + 3 * (4 - width) * h) // tensor
    layers = model.num_layers * layer
    if parallel.activation_checkpointing == "full":
        layers = model.num_layers * width * h + layer
    return layers + 3 * width * h + masks


def _logits(model: ModelConfig, parallel: ParallelConfig, *, width: int) -> int:
    """Bytes of a token's logits: V / t values, their gradient, and the fp32 softmax.

    Fused kernels write the gradient over the logits and keep no softmax.
    """
    rows = model.padded_vocab_size // parallel.tensor
    return rows * (width if model.kernels == "fused" else 2 * width + 4)
