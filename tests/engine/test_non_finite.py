"""A gradient that is not finite on one rank: seen by all in the same step, and the update is left out everywhere."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.guards import Guard, GuardsConfig, LossRatio
from megatron_ext.engine.copies import checksums
from megatron_ext.parallel.groups import destroy_parallel
from tests.engine.test_update_gate import equal, state_of, step
from tests.engine.training import Setup, set_up, small_config
from tests.ranks import run_ranks

COPIED, SPLIT = "decoder.layers.0.input_layernorm.weight", "decoder.layers.1.mlp.linear_fc1.weight"
STAGES = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]
IN_FULL = {(0, "fp32"), (1, "bf16")}
LAYOUTS = [
    pytest.param(*layout, id=f"zero{layout[0]}-{layout[1]}", marks=() if layout in IN_FULL else (pytest.mark.slow,))
    for layout in STAGES
]

Seen = tuple[bool, bool, list[bool], list[bool], list[bool], bool]


def config_of(stage: int, precision: str, **parallel: Any) -> str:
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 36}, "precision": precision}
    layout = {"micro_batch_tokens": 64, "zero_stage": stage} | parallel
    return small_config(parallel=layout, training=training).model_dump_json()


@contextmanager
def poisoned(setup: Setup, name: str | None, *, value: float) -> Iterator[None]:
    """Make the gradient of a parameter not finite on the last rank alone."""
    if name is None or dist.get_rank() != dist.get_world_size() - 1:
        yield
        return
    hook = dict(setup.engine.module.named_parameters())[name].register_hook(lambda g: g * value)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hook.remove()


def poison_some(_rank: int, _world: int, config: str, guarded: bool, on_device: bool) -> list[Seen]:
    """For a copied and a split parameter: (state as before, ranks alike, what each step was called, ...)."""
    results: list[Seen] = []
    for name, value in ((COPIED, math.nan), (SPLIT, math.inf)):
        setup = set_up(RunConfig.model_validate_json(config))
        if on_device:
            setup.engine._gate._waits = False
        guard = Guard(GuardsConfig(non_finite="skip"), LossRatio()) if guarded else None
        same, skipped, finite, asked = True, [], [], []
        for batch in range(5):
            before = state_of(setup)
            with poisoned(setup, name if batch in (0, 2, 3) else None, value=value):
                result = step(setup, batch, lr=1e-2, policy=guard)
            # Before the first update there is no state yet; after it, everything is as it was.
            if batch in (2, 3):
                same = same and equal(before, state_of(setup))
            skipped.append(bool(result.skipped))
            finite.append(math.isfinite(float(result.grad_norm)))
            asked.append(guard is not None and guard.incident is not None)
        after = state_of(setup)
        found = checksums(setup.engine.module.named_parameters(), setup.layout)
        destroy_parallel()
        setup = set_up(RunConfig.model_validate_json(config))
        for batch in (1, 4):
            step(setup, batch, lr=1e-2)
        unseen = equal(after, state_of(setup))
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, found)
        alike = all(everybody[0][key] == sums[key] for sums in everybody for key in sums if key in everybody[0])
        destroy_parallel()
        results.append((same, alike, skipped, finite, asked, unseen))
    return results


GOOD = [False, True, False, False, True]


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
@pytest.mark.parametrize("guarded", [True, False])
def test_a_copy_on_another_tensor_rank_is_seen_in_its_step(stage: int, precision: str, guarded: bool) -> None:
    ranks = run_ranks(poison_some, 2, config_of(stage, precision, tensor=2), guarded, False)
    asked = [guarded and not good for good in GOOD]
    expected = (True, True, [not good for good in GOOD], GOOD, asked, True)
    assert ranks == [[expected, expected]] * 2


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_without_guards_every_stage_and_precision_leaves_the_update_out(stage: int, precision: str) -> None:
    ranks = run_ranks(poison_some, 2, config_of(stage, precision), False, False)
    expected = (True, True, [not good for good in GOOD], GOOD, [False] * 5, True)
    assert ranks == [[expected, expected]] * 2


@pytest.mark.parametrize(("stage", "tensor"), [(0, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_the_flag_on_the_device_does_what_waiting_does(stage: int, tensor: int) -> None:
    """What a GPU does, for which the host does not wait."""
    ranks = run_ranks(poison_some, 2, config_of(stage, "fp32", tensor=tensor), False, True)
    expected = (True, True, [not good for good in GOOD], GOOD, [False] * 5, True)
    assert ranks == [[expected, expected]] * 2


def sums_of(_rank: int, _world: int, config: str) -> list[dict[tuple[str, str], int]]:
    setup = set_up(RunConfig.model_validate_json(config))
    try:
        step(setup, 0, lr=1e-2)
        before = setup.engine.checksums()
        if dist.get_rank() == 1:
            weight = dict(setup.engine.module.named_parameters())[COPIED]
            bits = getattr(weight, "ds_tensor", weight).data.view(
                torch.int32 if weight.element_size() == 4 else torch.int16
            )
            bits[3] ^= 1
        return [before, setup.engine.checksums()]
    finally:
        destroy_parallel()


@pytest.mark.parametrize(
    ("stage", "precision", "tensor", "compared"),
    [(1, "bf16", 2, True), pytest.param(0, "fp32", 1, True, marks=pytest.mark.slow), (3, "fp32", 1, False)],
)
def test_one_changed_bit_changes_the_checksum(stage: int, precision: str, tensor: int, compared: bool) -> None:
    (before, after), (other_before, other_after) = run_ranks(sums_of, 2, config_of(stage, precision, tensor=tensor))
    shared = before.keys() & other_before.keys()
    assert bool(shared) == compared, "ZeRO 3 keeps no copies over data ranks"
    assert all(before[key] == other_before[key] for key in shared)
    assert before == after
    assert [key[0] for key in other_after if other_after[key] != other_before[key]] == [COPIED]
