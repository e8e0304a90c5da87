"""What DeepSpeed's Adam for the CPU keeps outside of its state, made exact when a checkpoint is loaded."""

import math
from typing import Any

import torch

_NEGLIGIBLE = 2.0**-26
"""beta^t below this changes no bit of 1 - beta^t in float32."""


def restore_bias_corrections(optimizer: Any) -> None:
    """Bring the powers beta^t of a ``DeepSpeedCPUAdam`` to what they were where its loaded state was saved.

    Its C++ part multiplies them up from step to step in float32. A new one begins with ``pow(beta, t)`` instead, which
    has other last bits, and so had every update after a resume. Therefore it is made anew and one element, which is
    then dropped, takes the steps that were done; where the powers no longer count, none.
    """
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    group = optimizer.param_groups[0]
    lr, (first, second), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    optimizer.ds_opt_adam.destroy_adam(optimizer.opt_id)
    optimizer.ds_opt_adam.create_adam(optimizer.opt_id, lr, first, second, eps, decay, optimizer.adam_w_mode, False)
    if steps * math.log(max(first, second, _NEGLIGIBLE)) < math.log(_NEGLIGIBLE):
        return
    weight, gradient, moment, variance = torch.zeros(4, 1)
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id,
            *(step, lr, first, second, eps, decay, group["bias_correction"]),
            *(weight, gradient, moment, variance),
        )
