"""Checksums of the weights that a rank holds, to be compared with those of ranks that should hold the same."""

from collections.abc import Iterable

import torch

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
        part: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
        place = "" if split_dimension(name) is None else f"tensor rank {layout.tensor_rank}"
        values = parameter.detach()
        if part is not None:
            place += f" data rank {layout.data_rank}"
            total = int(parameter.ds_numel)  # type: ignore[attr-defined]
            values = part.flatten()[: max(0, total - layout.data_rank * part.numel())]
        keys.append((name, place))
        bits = values.contiguous().view(_BITS[values.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    return dict(zip(keys, torch.stack(sums).tolist(), strict=True))
