"""The place between the reduced gradient and the optimizer's update, where an update can still be refused."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from megatron_ext.engine.engine import UpdatePolicy

_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_: a zero gradient must not divide by zero


class GradientNorm:
    """Runs between the gradients' reduction and the optimizer's update.

    norm = sqrt(sum over all parameters of |g|^2), each parameter counted once: parameters that tensor ranks hold in
    parts are summed over the ranks, those that they hold as copies are counted on tensor rank 0. No host sync: norm and
    clipping coefficient stay on the device.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        clip: float,
        tensor_rank: int,
        tensor_group: dist.ProcessGroup,
    ) -> None:
        self._parameters = list(parameters)
        self._counted = [
            tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False) for parameter in self._parameters
        ]
        self._clip = clip
        self._group = tensor_group
        self.last: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        """Compute the norm of the reduced gradients and scale them down to ``clip`` where they exceed it."""
        gradients = [parameter.grad for parameter in self._parameters]
        counted = [g for g, count in zip(gradients, self._counted, strict=True) if count and g is not None]
        present = [g for g in gradients if g is not None]
        assert present, "the optimizer stepped without a gradient"
        squares = present[0].new_zeros((), dtype=torch.float32)
        if counted:
            squares = torch.stack(torch._foreach_norm(counted)).float().square().sum()
        dist.all_reduce(squares, group=self._group)
        self.last = squares.sqrt()
        if self._clip > 0:
            torch._foreach_mul_(present, (self._clip / (self.last + _EPSILON)).clamp(max=1.0))


class UpdateGate:
    """Stands in for the ``step`` of the optimizer that DeepSpeed wraps.

    DeepSpeed reduces, clips and clears gradients around that call, whatever the ZeRO stage. A refused update is a call
    that does nothing, so weights, moments and the optimizer's step counters stay as they are bit for bit, and
    everything else is as after any other step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        own_norm: GradientNorm | None,
        grad_norm: Callable[[], torch.Tensor | float],
    ) -> None:
        """Take the place of ``optimizer.step``.

        Args:
            optimizer: The innermost optimizer.
            own_norm: To be run before each update, where DeepSpeed neither computes the norm nor clips.
            grad_norm: Norm of the gradient that is about to be used.
        """
        self._update = optimizer.step
        self._own_norm = own_norm
        self._grad_norm = grad_norm
        self._policy: UpdatePolicy | None = None
        self._loss = torch.zeros(())
        self._answer: bool | None = None
        optimizer.step = self  # type: ignore[method-assign, assignment]

    def open(self, policy: UpdatePolicy | None, loss: torch.Tensor) -> None:
        """Begin a step with this loss (0-d, on the device); without a policy every update is admitted."""
        self._policy, self._loss, self._answer = policy, loss, None

    def __call__(self) -> None:
        """Update, or not. DeepSpeed may call this several times a step, for one group of parameters each."""
        if self._own_norm is not None:
            self._own_norm()
        if self._policy is not None and self._answer is None:
            self._answer = self._ask(self._policy, self._grad_norm())
        if self._answer is not False:
            self._update()

    def close(self, *, overflow: bool, expected: bool) -> bool:
        """End the step and return whether the weights were left alone.

        Args:
            overflow: DeepSpeed itself found the gradient not finite and made no update.
            expected: Such an overflow belongs to dynamic loss scaling.
        """
        if overflow and self._policy is not None:
            self._ask(self._policy, None if expected else math.inf)
        return overflow or self._answer is False

    def _ask(self, policy: UpdatePolicy, grad_norm: torch.Tensor | float | None) -> bool:
        # The one wait for the device that a policy costs. All ranks see the largest values of any of them, so that they
        # cannot come to different answers; what is not finite becomes inf, for a maximum over NaN is undefined.
        known = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=self._loss.device)
        values = torch.stack((self._loss.float(), invalid_to_nan(known.float())))
        values = torch.where(values.isfinite(), values, math.inf)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        loss, norm = values.tolist()
        return policy.admits(loss=loss, grad_norm=None if grad_norm is None else norm)


def invalid_to_nan(norm: torch.Tensor) -> torch.Tensor:
    """A norm with DeepSpeed's sign for "not finite", a negative number, spelled out."""
    return torch.where(norm < 0, math.nan, norm)


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
