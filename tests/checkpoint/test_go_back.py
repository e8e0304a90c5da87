"""Going back to a checkpoint in a run that goes on: the steps after it come out as they did the first time."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.verify import read_manifest
from megatron_ext.config.run import RunConfig
from megatron_ext.parallel.groups import destroy_parallel
from tests.checkpoint.test_resume import checkpointer_of, with_dropout
from tests.engine.training import Curve, run_steps, set_up
from tests.ranks import run_ranks

BACK, LAST = 4, 9


def there_and_back(_rank: int, _world: int, config: str) -> tuple[Curve, Curve]:
    setup = set_up(RunConfig.model_validate_json(config))
    try:
        checkpointer = checkpointer_of(setup)
        run_steps(setup, 0, BACK)
        checkpointer.save(step=BACK, tokens=setup.plan.tokens_at_step(BACK), loss_ratio={})
        first = run_steps(setup, BACK, LAST)
        checkpointer.save(step=LAST, tokens=setup.plan.tokens_at_step(LAST), loss_ratio={})
        # Whatever a broken step leaves behind must not reach what follows.
        hook = setup.engine.module.register_forward_hook(lambda _m, _i, losses: losses * math.nan)
        run_steps(setup, LAST, LAST + 1)
        hook.remove()
        found = checkpointer.newest(not_after=LAST - 1)
        assert found is not None
        manifest = checkpointer.load(found)
        changed = replace(manifest, guard={"rollbacks": 1}, skipped_samples=[[3, 2]])
        checkpointer.go_on_from(found, changed)
        assert checkpointer.newest() == found
        assert read_manifest(found) == changed
        return first, run_steps(setup, BACK, LAST)
    finally:
        destroy_parallel()


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [
        ({"zero_stage": 0}, "fp32"),
        ({"zero_stage": 1}, "bf16"),
        ({"zero_stage": 3}, "fp32"),
        pytest.param({"zero_stage": 0}, "bf16", marks=pytest.mark.slow),
        pytest.param({"zero_stage": 2}, "fp32", marks=pytest.mark.slow),
        pytest.param({"zero_stage": 2}, "bf16", marks=pytest.mark.slow),
        pytest.param({"zero_stage": 3}, "bf16", marks=pytest.mark.slow),
    ],
)
def test_going_back_is_exact(tmp_path: Path, parallel: dict[str, Any], precision: str) -> None:
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 36}, "precision": precision}
    config = with_dropout(tmp_path, parallel={"micro_batch_tokens": 64} | parallel, training=training)
    for first, second in run_ranks(there_and_back, 2, config):
        assert first == second
        assert all(map(math.isfinite, second.losses))
