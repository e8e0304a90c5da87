"""Checks between sections of a run config. Each names the keys, the values, and what to write instead."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig


def check_run(config: "RunConfig") -> None:
    """Raise ValueError for the first contradiction between two sections of ``config``."""
    heads, width, tensor = config.model.num_attention_heads, config.model.hidden_size, config.parallel.tensor
    if width % heads:
        raise ValueError(f"model.hidden_size {width} is not divisible by model.num_attention_heads {heads}")
    if heads % tensor:
        raise ValueError(f"model.num_attention_heads {heads} is not divisible by parallel.tensor {tensor}")
