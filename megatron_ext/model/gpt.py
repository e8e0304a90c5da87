"""GPT-2/GPT-3 on megatron-core's parallel modules: token ids in, per-token losses or logits out.

Without a run, on one process:

    with single_rank_layout() as layout:
        model = build_gpt(ModelConfig(...), layout=layout, positions=128, seed=1)
        losses = model(tokens, labels)

Shapes: s positions, b sequences, h the hidden size, t tensor ranks.
"""

import functools
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.model.layer import Layer, LayerNorm, core_attention
from megatron_ext.ops.cross_entropy import Statistics, VocabSlice, cross_entropy
from megatron_ext.ops.kernels import Kernels, is_fused
from megatron_ext.parallel.groups import Layout
from megatron_ext.parallel.rng import RngStreams, seed_streams
from megatron_ext.parallel.vocab import gather_vocab, real_slice, reduce_over_vocab, vocab_parallel_cross_entropy

Recomputation = Literal["none", "full"]
"""``parallel.activation_checkpointing``."""

_EXTRA_STATE = "_extra_state"
# What "no CUDA graphs" is called: the default means the same and warns. Renamed in megatron-core 0.18.
_GRAPHS = "cuda_graph_modules" if "cuda_graph_modules" in TransformerConfig.__dataclass_fields__ else "cuda_graph_scope"


class Gpt(torch.nn.Module):
    """One tensor rank's part of the model. Parameter names are megatron-core's; the state dict holds tensors only."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        layout: Layout,
        positions: int,
        activation_checkpointing: Recomputation,
        streams: RngStreams,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.positions = positions
        self.layout = layout
        self.streams = streams
        self._vocab_size = model.vocab_size
        self._tied = model.tie_embeddings
        self._kernels: Kernels = kernels
        # The order of these three is the order in which initial weights are drawn.
        config = transformer_config(model, tensor=layout.tensor_size)
        self.embedding = LanguageModelEmbedding(
            config, model.padded_vocab_size, positions, "learned_absolute", tp_group=layout.tensor_group
        )
        layer = {
            "core_attention": core_attention(model.attention, streams, kernels),
            "exact_gelu": model.activation == "gelu_erf",
            "kernels": kernels,
            "recompute_streams": streams if activation_checkpointing == "full" else None,
        }
        modules = TransformerBlockSubmodules(
            layer_specs=[ModuleSpec(module=Layer, params=layer)] * model.num_layers,
            layer_norm=ModuleSpec(module=LayerNorm, params={"kernels": kernels}),
        )
        self.decoder = TransformerBlock(config, modules)
        self.output_layer = ColumnParallelLinear(
            model.hidden_size,
            model.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            # Each rank keeps the logits of its slice of the vocabulary: gathered they are the largest tensor.
            gather_output=False,
            skip_weight_param_allocation=model.tie_embeddings,
            tp_group=layout.tensor_group,
        )
        self.register_state_dict_post_hook(_drop_extra_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_no_extra_state)  # type: ignore[no-untyped-call]

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor | None = None, *, last_only: bool = False
    ) -> torch.Tensor:
        """Loss of each token or, without labels, logits.

        ``tokens`` and ``labels`` are ids int64 [b, s], s from 1 to ``positions``. Returns with labels the negative
        log-likelihoods float32 [b, s]; without, logits [b, s, vocab_size] in the module's dtype, gathered over tensor
        ranks, or [b, 1, vocab_size] of the last position with ``last_only``.

        Raises:
            UserError: the sequence is longer than the position table.
        """
        length = tokens.shape[1]
        if length > self.positions:
            raise UserError(
                f"a sequence of {length} tokens is longer than the position table; "
                f"model.max_position_embeddings is {self.positions}"
            )
        # megatron-core's layers want the sequence first: [b, s] -> [s, b, h].
        positions = torch.arange(length, device=tokens.device).unsqueeze(0)  # [1, s]
        hidden = self.decoder(hidden_states=self.embedding(tokens, positions), attention_mask=None)

        # Generation asks for one position: the other logits are not computed.
        if last_only:
            hidden = hidden[-1:]  # [1, b, h]
        weight = self.embedding.word_embeddings.weight if self._tied else None
        logits, _ = self.output_layer(hidden, weight=weight)  # [s, b, padded vocabulary / t]

        if labels is None:
            # [s, b, vocab_size] -> [b, s, vocab_size]
            return gather_vocab(logits, vocab_size=self._vocab_size, layout=self.layout).transpose(0, 1)
        # Labels turned to the logits' order [s, b], which are too large to turn; the losses [s, b] -> [b, s].
        losses = token_losses(
            logits, labels.t(), vocab_size=self._vocab_size, layout=self.layout, kernels=self._kernels
        )
        return losses.t().contiguous()


def build_gpt(
    model: ModelConfig,
    *,
    layout: Layout,
    positions: int,
    seed: int,
    activation_checkpointing: Recomputation = "none",
    streams: RngStreams | None = None,
    kernels: Kernels = "reference",
) -> Gpt:
    """The model of section ``model``, on the CPU in float32; move and cast it afterwards.

    Args:
        model: Shape and numerics. ``kernels`` in it may be "auto", so that the argument below decides.
        layout: This rank's place; of one process alone, ``single_rank_layout``.
        positions: Rows of the position table, the longest sequence.
        seed: Of the initial weights, which do not depend on the layout.
        activation_checkpointing: "full" recomputes every layer in backward.
        streams: Those of the device it will run on; without them the process is seeded for the CPU.
        kernels: Which ones compute; they change neither weights nor names.
    """
    streams = streams or seed_streams(seed, layout, torch.device("cpu"))
    # A private seed, and the process's own streams untouched: weights are equal on all ranks, dropout is not.
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        return Gpt(
            model,
            layout=layout,
            positions=positions,
            activation_checkpointing=activation_checkpointing,
            streams=streams,
            kernels=kernels,
        )
    finally:
        torch.default_generator.set_state(state)


def transformer_config(model: ModelConfig, *, tensor: int = 1) -> TransformerConfig:
    """``model`` in megatron-core's terms; parameters are made in float32 on the CPU.

    Initialization is GPT-2's: normal(0, init_std), the projections into the residual stream scaled by
    1/sqrt(2 * layers) (megatron-core's defaults), biases 0, LayerNorm 1.
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_size,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.layernorm_epsilon,
        init_method_std=model.init_std,
        tensor_model_parallel_size=tensor,
        params_dtype=torch.float32,
        # On every device: a rank's weights are then a slice of the same matrix whatever the layout.
        use_cpu_initialization=True,
        # Ours take their place.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **{_GRAPHS: []},
    )


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, layout: Layout, kernels: Kernels
) -> torch.Tensor:
    """Negative log-likelihood of each label, float32 (float64 for float64 logits), of the shape of ``labels``.

    Args:
        logits: [..., rows], this tensor rank's slice of the padded vocabulary; is overwritten.
        labels: Ids [...] below ``vocab_size``.
        vocab_size: Ids from here on are padding.
        layout: This rank's place.
        kernels: Which ones compute.
    """
    if not is_fused(kernels, logits):
        return vocab_parallel_cross_entropy(logits, labels, vocab_size=vocab_size, layout=layout)
    first, real = real_slice(logits.shape[-1], vocab_size=vocab_size, layout=layout)
    combine = None if layout.tensor_size == 1 else functools.partial(_over_ranks, layout=layout)
    return cross_entropy(logits, labels, VocabSlice(first, real, combine), kernels=kernels)


def _over_ranks(own: Statistics, *, layout: Layout) -> Statistics:
    """Statistics of the whole vocabulary from those of every rank's slice, each of the shape of the labels."""
    maximum = own.maximum.clone()
    reduce_over_vocab(maximum, layout, dist.ReduceOp.MAX)
    # sum exp(z - m) = sum over slices of exp(m_slice - m) * sum in slice of exp(z - m_slice). A slice that is all
    # padding has maximum -inf and total 0, which add nothing.
    sums = torch.stack([own.total * (own.maximum - maximum).exp(), own.target])
    reduce_over_vocab(sums, layout, dist.ReduceOp.SUM)
    total, target = sums.unbind()
    return Statistics(maximum, total, target)


def _drop_extra_state(_module: torch.nn.Module, state: dict[str, Any], _prefix: str, _metadata: object) -> None:
    # megatron-core's linear layers put a None there for Transformer Engine's sake.
    for name in [name for name in state if name.endswith(_EXTRA_STATE)]:
        del state[name]


def _expect_no_extra_state(_module: torch.nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(_EXTRA_STATE)]
