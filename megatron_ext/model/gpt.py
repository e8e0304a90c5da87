"""GPT-2/GPT-3 as megatron-core's GPTModel: token ids in, per-token losses or logits out."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.model.loss import token_losses
from megatron_ext.model.spec import block_submodules, transformer_config
from megatron_ext.ops.kernels import Kernels
from megatron_ext.parallel.groups import Layout
from megatron_ext.parallel.rng import RngStreams, seed_streams
from megatron_ext.parallel.vocab import gather_vocab

_EXTRA_STATE = "_extra_state"


class Gpt(GPTModel):  # type: ignore[misc]
    """One tensor rank's part of the model. Parameter names are megatron-core's; the state dict holds tensors only."""

    def __init__(self, config: RunConfig, layout: Layout, streams: RngStreams, *, kernels: Kernels) -> None:
        super().__init__(
            config=transformer_config(config),
            transformer_layer_spec=block_submodules(config, streams, kernels),
            vocab_size=config.model.padded_vocab_size,
            max_sequence_length=config.max_positions,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="learned_absolute",
        )
        self.layout = layout
        self.streams = streams
        self.kernels: Kernels = kernels
        self.real_vocab_size = config.model.vocab_size
        self.register_state_dict_post_hook(_drop_extra_state)
        self.register_load_state_dict_post_hook(_expect_no_extra_state)

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor | None = None, *, last_only: bool = False
    ) -> torch.Tensor:
        """Loss of each token or, without labels, logits.

        ``tokens`` and ``labels`` are ids int64 [b, s], s from 1 to the size of the position table. Returns with labels
        the negative log-likelihoods float32 [b, s]; without, logits [b, s, vocab_size] in the module's dtype, gathered
        over tensor ranks, or [b, 1, vocab_size] of the last position with ``last_only``.

        Raises:
            UserError: the sequence is longer than the position table.
        """
        length = tokens.shape[1]
        if length > self.max_sequence_length:
            raise UserError(
                f"a sequence of {length} tokens is longer than the position table; "
                f"model.max_position_embeddings is {self.max_sequence_length}"
            )
        positions = torch.arange(length, device=tokens.device).unsqueeze(0)
        hidden = self.decoder(hidden_states=self.embedding(tokens, positions), attention_mask=None)
        if last_only:
            hidden = hidden[-1:]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        if labels is None:
            return gather_vocab(logits, vocab_size=self.real_vocab_size, layout=self.layout).transpose(0, 1)
        losses = token_losses(
            logits, labels.t(), vocab_size=self.real_vocab_size, layout=self.layout, kernels=self.kernels
        )
        return losses.t().contiguous()


def build_gpt(
    config: RunConfig, layout: Layout, streams: RngStreams | None = None, *, kernels: Kernels = "reference"
) -> Gpt:
    """The model of ``config`` on the CPU in float32; its initial weights depend on the seed, not on the layout.

    ``streams`` are the ones of the device it will run on; without them the process is seeded for the CPU. ``kernels``
    are what ``model.kernels`` has come to; they change neither weights nor names.
    """
    assert layout.tensor_size == config.parallel.tensor, "the groups were made for another run"
    streams = streams or seed_streams(config.seed, layout, torch.device("cpu"))
    # A private seed, and the process's own streams untouched: weights are equal on all ranks, dropout is not.
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(config.seed)
    try:
        return Gpt(config, layout, streams, kernels=kernels)
    finally:
        torch.default_generator.set_state(state)


def _drop_extra_state(_module: torch.nn.Module, state: dict[str, Any], _prefix: str, _metadata: object) -> None:
    # megatron-core's linear layers put a None there for Transformer Engine's sake.
    for name in [name for name in state if name.endswith(_EXTRA_STATE)]:
        del state[name]


def _expect_no_extra_state(_module: torch.nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(_EXTRA_STATE)]
