"""Whether weights are numbers, on any ZeRO stage."""

from collections.abc import Iterable

import torch
import torch.distributed as dist


@torch.no_grad()
def weights_finite(parameters: Iterable[torch.nn.Parameter], *, data_rank: int, device: torch.device) -> bool:
    """Whether no weight on any rank is NaN or infinite, the same answer on every rank. Waits for the device.

    Args:
        parameters: The module's; under ZeRO 3 each rank looks at its own part of them.
        data_rank: This rank among the data-parallel ranks.
        device: This rank's device, on which the answer is reduced.
    """
    checks = [_own_part(parameter, data_rank).isfinite().all().to(device) for parameter in parameters]
    bad = (~torch.stack(checks)).any().int()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bool(bad)


def _own_part(parameter: torch.nn.Parameter, data_rank: int) -> torch.Tensor:
    part: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter
    # The last ranks' parts end in padding that nobody has written.
    total = int(parameter.ds_numel)  # type: ignore[attr-defined]
    return part.flatten()[: max(0, total - data_rank * part.numel())]
