"""The parallel section: how the run is laid out over ranks and micro-batches."""

from typing import Literal

from megatron_ext.base import PositiveFloat, PositiveInt, Section


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
