"""Norm and clipping of the gradient where DeepSpeed has none of its own: in fp32 without ZeRO."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_ext.engine.update_gate import zero_or_nan

_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_: a zero gradient must not divide by zero


class GradientNorm:
    """Runs between the gradients' reduction and the optimizer's update.

    norm = sqrt(sum over all parameters of |g|^2), each parameter counted once: parameters that tensor ranks hold in
    parts are summed over the ranks, those that they hold as copies are counted on tensor rank 0; a copy that is not
    finite makes it NaN. No host sync: norm and clipping coefficient stay on the device.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        clip: float,
        tensor_rank: int,
        tensor_group: dist.ProcessGroup,
    ) -> None:
        self._counted: list[torch.nn.Parameter] = []
        self._copies: list[torch.nn.Parameter] = []
        for parameter in parameters:
            counts = tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)
            (self._counted if counts else self._copies).append(parameter)
        self._clip = clip
        self._group = tensor_group
        self.last: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        """Compute the norm of the reduced gradients and scale them down to ``clip`` where they exceed it."""
        counted = [parameter.grad for parameter in self._counted if parameter.grad is not None]
        copies = [parameter.grad for parameter in self._copies if parameter.grad is not None]
        present = counted + copies
        assert present, "the optimizer stepped without a gradient"
        squares = present[0].new_zeros((), dtype=torch.float32)
        if counted:
            squares = torch.stack(torch._foreach_norm(counted)).float().square().sum()
        squares += zero_or_nan(copies, squares.device)
        dist.all_reduce(squares, group=self._group)
        self.last = squares.sqrt()
        if self._clip > 0:
            torch._foreach_mul_(present, (self._clip / (self.last + _EPSILON)).clamp(max=1.0))
