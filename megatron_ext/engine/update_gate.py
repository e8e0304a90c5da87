"""The place between the reduced gradient and the optimizer's update, where an update can still be refused."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_ext.engine.gradient_norm import GradientNorm


class Judge(Protocol):
    """Who decides about updates. Every rank asks its own, with the same values, and gets the same answer."""

    def admits(self, *, loss: float, grad_norm: float | None) -> bool:
        """Whether the step with this loss and gradient norm may change the weights. Called once a step.

        Args:
            loss: Mean loss of the step; inf where any rank's is not finite.
            grad_norm: Norm before clipping; inf where the gradient is not finite on any rank; None for an overflow of
                fp16, with which the loss scale deals.
        """


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
        self._judge: Judge | None = None
        self._loss = torch.zeros(())
        self._answer: bool | None = None
        optimizer.step = self  # type: ignore[method-assign, assignment]

    def open(self, judge: Judge | None, loss: torch.Tensor) -> None:
        """Begin a step with this loss (0-d, on the device); without a judge every update is admitted."""
        self._judge, self._loss, self._answer = judge, loss, None

    def __call__(self) -> None:
        """Update, or not. DeepSpeed may call this several times a step, for one group of parameters each."""
        if self._own_norm is not None:
            self._own_norm()
        if self._judge is not None and self._answer is None:
            self._answer = self._ask(self._judge, self._grad_norm())
        if self._answer is not False:
            self._update()

    def close(self, *, overflow: bool, expected: bool) -> bool:
        """End the step and return whether the weights were left alone.

        Args:
            overflow: DeepSpeed itself found the gradient not finite and made no update.
            expected: Such an overflow belongs to dynamic loss scaling.
        """
        if overflow and self._judge is not None:
            self._ask(self._judge, None if expected else math.inf)
        return overflow or self._answer is False

    def _ask(self, judge: Judge, grad_norm: torch.Tensor | float | None) -> bool:
        # The one wait for the device that a judge costs. All ranks see the largest values of any of them, so that they
        # cannot come to different answers; what is not finite becomes inf, for a maximum over NaN is undefined.
        known = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=self._loss.device)
        values = torch.stack((self._loss.float(), invalid_to_nan(known.float())))
        values = torch.where(values.isfinite(), values, math.inf)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        loss, norm = values.tolist()
        return judge.admits(loss=loss, grad_norm=None if grad_norm is None else norm)


def invalid_to_nan(norm: torch.Tensor) -> torch.Tensor:
    """A norm with DeepSpeed's sign for "not finite", a negative number, spelled out."""
    return torch.where(norm < 0, math.nan, norm)
