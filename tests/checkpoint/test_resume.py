"""A run that stops and goes on in another process is, bit for bit, the run that never stopped."""

import resource
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpoint.checkpointer import Checkpointer, RunIdentity
from megatron_ext.checkpoint.store import write_manifest
from megatron_ext.checkpoint.verify import read_manifest
from megatron_ext.checkpoint.weights import load_model, open_checkpoint
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import destroy_parallel
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.process_group import Processes
from tests.checkpoint.test_verify import EXECUTED, Reduced
from tests.engine.test_position_loss import Rows, position_losses
from tests.engine.training import CPU, SEQ_LEN, Curve, Setup, run_steps, set_up, small_config
from tests.ranks import run_ranks

STOP = 13  # in the middle of the length warmup, and of Adam's own warmup


def checkpointer_of(setup: Setup) -> Checkpointer:
    group = dist.new_group(backend="gloo")
    processes = Processes(info=rank_info(), host_group=group, store=dist.HashStore())  # type: ignore[attr-defined]
    config = setup.config
    layout = {"tensor": config.parallel.tensor, "zero_stage": config.parallel.zero_stage}
    return Checkpointer(
        config.run_dir / "checkpoints",
        setup.engine,
        streams=setup.streams,
        processes=processes,
        identity=RunIdentity(
            config=config.model_dump(mode="json"),
            determining=config.determining_values(),
            layout=layout | {"world_size": processes.info.world_size},
        ),
        config=config.checkpoint,
    )


def whole_run(_rank: int, _world_size: int, config: str) -> Curve:
    try:
        return run_steps(set_up(RunConfig.model_validate_json(config)))
    finally:
        destroy_parallel()


def first_part(_rank: int, _world_size: int, config: str) -> Curve:
    try:
        setup = set_up(RunConfig.model_validate_json(config))
        curve = run_steps(setup, 0, STOP)
        tokens = setup.plan.tokens_at_step(STOP)
        checkpointer_of(setup).save(step=STOP, tokens=tokens, loss_ratio={"lowest": curve.losses[-1]})
        return curve
    finally:
        destroy_parallel()


def second_part(_rank: int, _world_size: int, config: str) -> tuple[Curve, npt.NDArray[np.float64]]:
    """The rest of the run, and the validation loss at each position with which it begins."""
    try:
        setup = set_up(RunConfig.model_validate_json(config))
        manifest = checkpointer_of(setup).resume()
        assert manifest is not None
        assert manifest.step == STOP
        assert manifest.tokens == setup.plan.tokens_at_step(STOP)
        losses = position_losses(setup)
        return run_steps(setup, manifest.step), losses
    finally:
        destroy_parallel()


def refusal(_rank: int, _world_size: int, config: str) -> str:
    try:
        setup = set_up(RunConfig.model_validate_json(config))
        with pytest.raises(UserError) as caught:
            checkpointer_of(setup).resume()
        return str(caught.value)
    finally:
        destroy_parallel()


def with_dropout(tmp_path: Path, **sections: dict[str, Any]) -> str:
    model = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    config = small_config(model=_model() | model, **sections)
    return config.model_copy(update={"output_dir": str(tmp_path)}).model_dump_json()


def _model() -> dict[str, Any]:
    return small_config().model.model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("ranks", "parallel", "precision"),
    [
        (1, {"zero_stage": 0}, "fp32"),
        (2, {"zero_stage": 1}, "fp32"),
        (2, {"zero_stage": 2}, "fp32"),
        (2, {"zero_stage": 3}, "fp32"),
        (2, {"zero_stage": 1, "tensor": 2}, "fp32"),
        (2, {"zero_stage": 1}, "bf16"),
        (2, {"zero_stage": 3}, "bf16"),
    ],
)
def test_resume_is_exact(tmp_path: Path, ranks: int, parallel: dict[str, Any], precision: str) -> None:
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 36}, "precision": precision}
    config = with_dropout(tmp_path, parallel={"micro_batch_tokens": 64} | parallel, training=training)
    whole = run_ranks(whole_run, ranks, config)[0]
    first = run_ranks(first_part, ranks, config)[0]
    second, losses = run_ranks(second_part, ranks, config)[0]
    joined = replace(
        first,
        **{field.name: getattr(first, field.name) + getattr(second, field.name) for field in fields(Curve)},
    )
    assert joined == whole
    # Any layout's checkpoint opens as a model on one rank. ZeRO 3 keeps float32 weights, of which bf16 is the rounding.
    rows = torch.from_numpy(np.stack([Rows().read(index, 0, SEQ_LEN + 1) for index in range(len(Rows()))]))
    with load_model(tmp_path / "run", CPU) as loaded, torch.no_grad():
        assert loaded.manifest.step == STOP
        expected = loaded.model(rows[:, :-1], rows[:, 1:]).double().mean(dim=0)
    np.testing.assert_allclose(losses, expected, rtol=1e-5 if precision == "fp32" else 3e-2)


def test_another_model_and_layout_are_refused(tmp_path: Path) -> None:
    run_ranks(first_part, 1, with_dropout(tmp_path))
    other = with_dropout(tmp_path, learning_rate={"peak": 0.5})
    message = run_ranks(refusal, 1, other)[0]
    assert "learning_rate.peak is 0.01 there and 0.5 here" in message
    assert "another name" in message
    message = run_ranks(refusal, 2, with_dropout(tmp_path))[0]
    assert "world_size is 1 there and 2 here" in message


def test_damaged_file_is_named(tmp_path: Path) -> None:
    config = with_dropout(tmp_path)
    run_ranks(first_part, 1, config)
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{STOP}"
    damaged = next(checkpoint.glob("*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    message = run_ranks(refusal, 1, config)[0]
    assert f"{damaged} is damaged: it has 1,000 bytes" in message
    assert "remove it to begin anew" in message


def planted(_rank: int, _world_size: int, config: str) -> list[str]:
    """Code in each file of the newest checkpoint in turn, with sums and as of an earlier version; who was refused."""
    setup = set_up(RunConfig.model_validate_json(config))
    try:
        checkpointer, refused = checkpointer_of(setup), []
        checkpointer.save(step=1, tokens=1, loss_ratio={})
        older = checkpointer.newest()
        assert older is not None
        for name in sorted(path.name for path in older.glob("*.pt")):
            for listed in (True, False):
                newest = checkpointer.save(step=2, tokens=2, loss_ratio={})
                torch.save({"module": Reduced()}, newest / name)
                if not listed:
                    write_manifest(newest, replace(read_manifest(newest), files={}))
                try:
                    open_checkpoint(newest).weights()
                except UserError as error:
                    refused.append(str(error))
                manifest = checkpointer.resume()
                assert manifest is not None
                assert manifest.step == 1
                # DeepSpeed's own reader, if it came to that.
                if not name.startswith("rng"):
                    with pytest.raises(UserError, match=name):
                        setup.engine.load(newest.parent, sorted(newest.parent.glob("*.damaged*"))[-1].name)
        assert not EXECUTED
        return refused
    finally:
        destroy_parallel()


@pytest.mark.parametrize("zero", [1, 3])
def test_no_file_of_a_checkpoint_is_executed(tmp_path: Path, zero: int) -> None:
    config = with_dropout(tmp_path, parallel={"micro_batch_tokens": 64, "zero_stage": zero})
    refused = run_ranks(planted, 1, config)[0]
    # A model without its run reads the optimizer's state of ZeRO 3 alone.
    assert sum("model_states" in message for message in refused) == 2
    assert sum("optim_states" in message for message in refused) == (0 if zero == 1 else 2)


def full_disk(_rank: int, _world_size: int, config: str) -> tuple[str, str, list[str]]:
    """Save, save where no file may grow beyond 20 kB, save again: the message, the newest after it, what is left."""
    setup = set_up(RunConfig.model_validate_json(config))
    try:
        checkpointer = checkpointer_of(setup)
        checkpointer.save(step=1, tokens=1, loss_ratio={})
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(UserError) as caught:
            checkpointer.save(step=2, tokens=2, loss_ratio={})
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        newest = checkpointer.newest()
        assert newest is not None
        assert checkpointer.load(newest).step == 1
        path = checkpointer.save(step=2, tokens=2, loss_ratio={})
        return (
            str(caught.value),
            newest.name,
            sorted(item.name for item in path.parent.iterdir() if item.suffix != ".py"),
        )
    finally:
        destroy_parallel()


def test_a_save_that_fails_says_so_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    message, newest, left = run_ranks(full_disk, 1, with_dropout(tmp_path))[0]
    assert "checkpoint after step 2 could not be written" in message
    assert "4 checkpoints (checkpoint.keep_last + 1)" in message
    assert newest == "step_1"
    assert left == ["latest", "step_1", "step_2"], "nothing of the failed one stays"
