"""The place between the reduced gradient and the optimizer's update, where an update can still be refused."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.engine.engine import UpdatePolicy


class UpdateGate:
    """Stands in for the ``step`` of the optimizer that DeepSpeed wraps.

    DeepSpeed reduces, clips and clears gradients around that call, whatever the ZeRO stage. An update that is left out
    is a call that does nothing, so weights, moments and the optimizer's step counters stay as they are bit for bit, and
    everything else is as after any other step. It is left out where a policy refuses it, and always where the gradient
    is not finite on any rank, of which DeepSpeed itself sees a part.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        own_norm: Callable[[], None] | None,
        grad_norm: Callable[[], torch.Tensor | float],
        copies: Callable[[], list[torch.Tensor]] | None,
        waits: bool,
    ) -> None:
        """Take the place of ``optimizer.step``.

        Args:
            optimizer: The innermost optimizer.
            own_norm: To be run before each update, where DeepSpeed neither computes the norm nor clips.
            grad_norm: Norm of the gradient that is about to be used.
            copies: This rank's gradients in use that may not be in that norm; None: all of every rank are.
            waits: Whether the host waits to hear that a gradient is not finite. If not, ``optimizer`` is one of torch's
                fused ones, which leave an update out by a flag on the device; with a policy it waits all the same.
        """
        self._optimizer: Any = optimizer
        self._update = optimizer.step
        self._own_norm, self._grad_norm, self._copies, self._waits = own_norm, grad_norm, copies, waits
        self._policy: UpdatePolicy | None = None
        self._loss = torch.zeros(())
        self._asked = self._refused = False
        self._broken: torch.Tensor | bool = False
        optimizer.step = self  # type: ignore[method-assign, assignment]

    def open(self, policy: UpdatePolicy | None, loss: torch.Tensor) -> None:
        """Begin a step with this loss (0-d, on the device); without a policy every finite update is admitted."""
        self._policy, self._loss = policy, loss
        self._asked = self._refused = self._broken = False

    def __call__(self) -> None:
        """Update, or not. DeepSpeed may call this several times a step, for one group of parameters each."""
        if self._own_norm is not None:
            self._own_norm()
        if not self._asked:
            self._asked = True
            self._decide()
        if not self._refused:
            self._update()

    def close(self, *, overflow: bool, expected: bool) -> tuple[bool | torch.Tensor, torch.Tensor | float]:
        """End the step and return whether the weights were left alone, and the norm: inf where it is not finite.

        Args:
            overflow: DeepSpeed itself found the gradient not finite and made no update.
            expected: Such an overflow belongs to dynamic loss scaling.
        """
        norm = self._grad_norm()
        if overflow:
            if self._policy is not None:
                self._ask(self._policy, self._reduced(math.inf), overflow=expected)
            return True, norm
        if isinstance(self._broken, torch.Tensor):
            return self._broken, torch.where(self._broken, math.inf, torch.as_tensor(norm))
        return self._refused, math.inf if self._broken else norm

    def _decide(self) -> None:
        if not self._waits:
            self._optimizer.found_inf = None
        if self._policy is None and self._own_norm is None and self._copies is None:
            return  # DeepSpeed has looked at every gradient of every rank
        values = self._reduced(self._grad_norm(), [] if self._copies is None else self._copies())
        if self._policy is not None:
            self._refused = not self._ask(self._policy, values)
        elif self._waits:
            self._broken = self._refused = not bool(values[1].isfinite())
        else:
            self._broken = values[1].isinf()
            self._optimizer.found_inf = self._broken.float()

    def _reduced(self, grad_norm: torch.Tensor | float, copies: Iterable[torch.Tensor] = ()) -> torch.Tensor:
        """Loss and norm, float32 [2]: the largest of any rank, so that ranks cannot come to different answers."""
        known = torch.as_tensor(grad_norm, device=self._loss.device).float()
        known = invalid_to_nan(known) + zero_or_nan(list(copies), known.device)
        values = torch.stack((self._loss.float(), known))
        # What is not finite becomes inf, for a maximum over NaN is undefined.
        values = torch.where(values.isfinite(), values, math.inf)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def _ask(self, policy: UpdatePolicy, values: torch.Tensor, *, overflow: bool = False) -> bool:
        loss, norm = values.tolist()  # the one wait for the device that a policy costs
        self._broken = not math.isfinite(norm)
        return policy.admits(loss=loss, grad_norm=None if overflow else norm) and not self._broken


def zero_or_nan(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """0 where all gradients are finite and NaN where one is not, 0-d: what may be added to a norm."""
    if not gradients:
        return torch.zeros((), device=device)
    return (torch.stack(torch._foreach_norm(gradients)).float() * 0).sum().to(device)


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
    checks = [own_part(parameter, data_rank).isfinite().all().to(device) for parameter in parameters]
    bad = (~torch.stack(checks)).any().int()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bool(bad)


def own_part(parameter: torch.nn.Parameter, data_rank: int) -> torch.Tensor:
    """The parameter, or where ZeRO 3 partitions it this data rank's part, flat."""
    part: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter
    # The last ranks' parts end in padding that nobody has written.
    total = int(parameter.ds_numel)  # type: ignore[attr-defined]
    return part.flatten()[: max(0, total - data_rank * part.numel())]
