"""What several ranks hold as copies: gradients that a norm counts on one of them, checksums of weights."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_ext.engine.update_gate import own_part
from megatron_ext.model.parameters import split_dimension
from megatron_ext.parallel.groups import Layout

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksums(named: Iterable[tuple[str, torch.nn.Parameter]], layout: Layout) -> dict[tuple[str, str], int]:
    """(Parameter, which part of it) -> sum of the bits of its elements, as integers modulo 2^64.

    Ranks with the same key hold the same elements. One changed bit always changes the sum. Where ZeRO 3 partitions a
    parameter, the part of the data rank is summed without what fills it up. Waits for the device once.
    """
    keys, sums = [], []
    for name, parameter in named:
        place = "" if split_dimension(name) is None else f"tensor rank {layout.tensor_rank}"
        if getattr(parameter, "ds_tensor", None) is not None:
            place += f" data rank {layout.data_rank}"
        keys.append((name, place))
        values = own_part(parameter, layout.data_rank).detach()
        bits = values.contiguous().view(_BITS[values.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    return dict(zip(keys, torch.stack(sums).tolist(), strict=True))


def gradients_in_use(optimizer: Any) -> list[torch.Tensor]:
    """This rank's reduced gradients when DeepSpeed's ``optimizer`` begins its update, of all groups of parameters."""
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None)  # ZeRO 1 and 2
    masters = masters or getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    masters = masters or [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # ZeRO hands one group after the other to the masters; the later ones still wait here.
    waiting = [gradient for group in getattr(optimizer, "averaged_gradients", {}).values() for gradient in group or ()]
    return waiting + [master.grad for master in masters if master.grad is not None]
