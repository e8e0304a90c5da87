"""A resume with the optimizer on the CPU is exact."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.config.run import RunConfig
from megatron_ext.engine.cpu_adam import restore_bias_corrections
from megatron_ext.parallel.groups import destroy_parallel
from tests.engine.test_update_gate import equal, state_of
from tests.engine.training import Curve, run_steps, set_up, small_config
from tests.ranks import run_ranks


class Powers:
    """What DeepSpeed's C++ Adam does with beta^t: multiplied from step to step, computed anew where it jumps."""

    def __init__(self) -> None:
        self.create_adam()

    def create_adam(self, *_arguments: object) -> None:
        self.step, self.power = 0, np.float32(1)

    def destroy_adam(self, _number: int) -> None:
        self.step = -1

    def adam_update(self, _number: int, step: int, _lr: float, _first: float, second: float, *_rest: object) -> None:
        if step == self.step + 1:
            self.power *= np.float32(second)
        elif step != self.step:
            self.power = np.float32(np.float32(second) ** step)
        self.step = step


class Optimizer:
    """The attributes of a ``DeepSpeedCPUAdam`` whose state was loaded after ``step`` updates."""

    def __init__(self, step: int) -> None:
        values = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True}
        self.param_groups, self.opt_id, self.adam_w_mode = [values], 3, True
        self.state = {"weight": {"step": step}}
        self.ds_opt_adam = Powers()


@pytest.mark.parametrize("steps", [0, 1, 40, 1000, 100_000])
def test_powers_are_those_of_the_run_that_went_on(steps: int) -> None:
    went_on, resumed = Optimizer(steps), Optimizer(steps)
    for step in range(1, steps + 2):
        went_on.ds_opt_adam.adam_update(3, step, 0.1, 0.9, 0.999)
    restore_bias_corrections(resumed)
    resumed.ds_opt_adam.adam_update(3, steps + 1, 0.1, 0.9, 0.999)
    left, right = (np.float32(1) - optimizer.ds_opt_adam.power for optimizer in (went_on, resumed))
    assert left == right


def train(_rank: int, _world: int, config: str, folder: str, resumes: bool) -> tuple[Curve, list[torch.Tensor]]:
    """Steps 10 to 20 of a run that saved after 10, or went on from what was saved, and its state."""
    setup = set_up(RunConfig.model_validate_json(config))
    try:
        if resumes:
            setup.engine.load(Path(folder), "step_10")
        else:
            run_steps(setup, 0, 10)
            setup.engine.save(Path(folder), "step_10")
        return run_steps(setup, 10, 20), state_of(setup)
    finally:
        destroy_parallel()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_is_the_one_that_went_on(tmp_path: Path, stage: int) -> None:
    # Builds DeepSpeed's extension where the cache of torch extensions has none.
    config = small_config(parallel={"zero_stage": stage, "offload_optimizer": "cpu"}).model_dump_json()
    whole, resumed = (run_ranks(train, 2, config, str(tmp_path), resumes, timeout=300)[0] for resumes in (False, True))
    assert whole[0] == resumed[0]
    assert equal(whole[1], resumed[1])
