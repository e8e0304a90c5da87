"""A refused update leaves no trace: the run goes on as one that never saw the batch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config.run import RunConfig
from megatron_ext.engine.engine import MicroBatch, StepResult, UpdatePolicy
from megatron_ext.parallel.groups import destroy_parallel
from tests.engine.training import VOCABULARY, Setup, set_up, small_config
from tests.ranks import run_ranks

STEPS, LENGTH, MICRO_BATCHES = 6, 16, 3
Asked = list[tuple[float, float | None]]


@dataclass
class Refuses:
    """Refuses some of its calls, and remembers what it was asked about."""

    numbers: tuple[int, ...]
    asked: Asked = field(default_factory=list)

    def admits(self, *, loss: float, grad_norm: float | None) -> bool:
        self.asked.append((loss, grad_norm))
        return len(self.asked) - 1 not in self.numbers


def step(
    setup: Setup, batch: int, *, lr: float, policy: UpdatePolicy | None = None, planted: float | None = None
) -> StepResult:
    """One step on tokens that depend on ``batch`` and the rank; ``planted`` multiplies the last rank's losses."""
    rank = setup.layout.data_rank
    generator = torch.Generator().manual_seed(100 * batch + rank)
    shape = (MICRO_BATCHES, 2, LENGTH + 1)
    rows = torch.randint(VOCABULARY, shape, generator=generator)
    pieces = [MicroBatch(row[:, :-1], row[:, 1:]) for row in rows]
    count = MICRO_BATCHES * 2 * LENGTH * setup.layout.data_size
    with spoiled(setup, planted if rank == setup.layout.data_size - 1 else None):
        return setup.engine.step(pieces, global_tokens=count, lr=lr, policy=policy)


@contextmanager
def spoiled(setup: Setup, factor: float | None) -> Iterator[None]:
    """Multiply the losses that the model returns."""
    hook = setup.engine.module.register_forward_hook(lambda _m, _i, out: out if factor is None else out * factor)
    try:
        yield
    finally:
        hook.remove()


def state_of(setup: Setup) -> list[torch.Tensor]:
    """Weights as the model has them, and everything in the optimizer: masters, moments, step counters."""
    optimizer = setup.engine._engine.optimizer
    base = setup.engine._engine.basic_optimizer
    tensors = [getattr(p, "ds_tensor", p).detach().clone() for p in setup.engine.module.parameters()]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        tensors += [t.detach().clone() for t in getattr(optimizer, name, ())]
    for state in base.state.values():
        tensors += [value.detach().clone() for _, value in sorted(state.items()) if isinstance(value, torch.Tensor)]
    return tensors


def refused_and_never_seen(
    _rank: int, _world: int, config: str, refused: tuple[int, ...], planted: tuple[int, ...]
) -> tuple[bool, bool, bool, Asked]:
    """Whether (refused steps changed nothing, they are called skipped, the rest equals a run without them)."""
    run = RunConfig.model_validate_json(config)
    setup, policy, same, skipped = set_up(run), Refuses(refused), True, []
    for batch in range(STEPS):
        before = state_of(setup)
        factor = math.nan if batch in planted else None
        skipped.append(step(setup, batch, lr=1e-2 * (batch + 1), policy=policy, planted=factor).skipped)
        if batch in refused:
            same = same and equal(before, state_of(setup))
    with_refused = state_of(setup)
    destroy_parallel()
    setup = set_up(run)
    for batch in range(STEPS):
        if batch not in refused:
            step(setup, batch, lr=1e-2 * (batch + 1))
    without = state_of(setup)
    destroy_parallel()
    named = skipped == [batch in refused for batch in range(STEPS)]
    return same, named, equal(with_refused, without), policy.asked


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


LAYOUTS = [
    (2, {"zero_stage": 0}, "fp32"),
    pytest.param(2, {"zero_stage": 1}, "fp32", marks=pytest.mark.slow),
    (2, {"zero_stage": 2}, "fp32"),
    pytest.param(2, {"zero_stage": 3}, "fp32", marks=pytest.mark.slow),
    pytest.param(2, {"zero_stage": 0}, "bf16", marks=pytest.mark.slow),
    (2, {"zero_stage": 1}, "bf16"),
    pytest.param(2, {"zero_stage": 2}, "bf16", marks=pytest.mark.slow),
    (2, {"zero_stage": 3}, "bf16"),
    (2, {"zero_stage": 1, "tensor": 2}, "fp32"),
]


def config_of(parallel: dict[str, Any], precision: str) -> str:
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 36}, "precision": precision}
    return small_config(parallel={"micro_batch_tokens": 64} | parallel, training=training).model_dump_json()


@pytest.mark.parametrize(("ranks", "parallel", "precision"), LAYOUTS)
def test_a_refused_update_leaves_no_trace(ranks: int, parallel: dict[str, Any], precision: str) -> None:
    config = config_of(parallel, precision)
    results = run_ranks(refused_and_never_seen, ranks, config, (2, 4), (4,))
    for same, named, equal_to_unseen, asked in results:
        assert (same, named, equal_to_unseen) == (True, True, True)
        assert len(asked) == STEPS, "one question a step"
        assert asked == results[0][3], "ranks were asked different things"
        finite = [[value is not None and math.isfinite(value) for value in pair] for pair in asked]
        assert finite == [[True, True]] * 4 + [[False, False]] + [[True, True]]


def test_the_first_update_refused() -> None:
    ((_, skipped, unseen, _),) = run_ranks(refused_and_never_seen, 1, config_of({"zero_stage": 1}, "fp32"), (0,), ())
    assert skipped
    assert unseen


def finite_weights(_rank: int, _world: int, config: str) -> list[bool]:
    setup = set_up(RunConfig.model_validate_json(config))
    try:
        answers = [setup.engine.weights_finite()]
        last = list(setup.engine.module.parameters())[-1]
        if dist.get_rank() == 1:
            getattr(last, "ds_tensor", last).data.flatten()[0] = math.nan
        return [*answers, setup.engine.weights_finite()]
    finally:
        destroy_parallel()


@pytest.mark.parametrize("stage", [1, 3])
def test_one_bad_weight_of_one_rank_is_seen_by_all(stage: int) -> None:
    assert run_ranks(finite_weights, 2, config_of({"zero_stage": stage}, "fp32")) == [[True, False]] * 2
