"""Going back to a checkpoint in a run that goes on: the steps after it come out as they did the first time."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.store import complete_checkpoints, drop_after, read_manifest
from megatron_ext.config.run import RunConfig
from megatron_ext.parallel.groups import destroy_parallel
from megatron_ext.runtime.files import replace_text
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


def test_later_checkpoints_go(tmp_path: Path) -> None:
    for step in (10, 5, 30, 20):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}" / "weights").write_text("x")
    removed = drop_after(tmp_path, tmp_path / "step_10")
    assert [path.name for path in removed] == ["step_30", "step_20"], "the newest first"
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_5", "step_10"]
    assert (tmp_path / "latest").read_text() == "step_10\n"
    assert {path.name for path in tmp_path.iterdir()} == {"step_5", "step_10", "latest"}


def test_a_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("old", "new"):
        replace_text(path, text)
        assert path.read_text() == text
        assert [item.name for item in tmp_path.iterdir()] == ["file"]
