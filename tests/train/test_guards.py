"""Guards in whole runs on two ranks: a batch that explodes, a NaN, and every action."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.train.guard_runs import BATCH, EVERY, STEPS, Planted, events, guarded, rolled_back, run_once
from tests.train.small_run import cli, train_records

BAD_STEP = 10
BAD_SAMPLE = BAD_STEP * BATCH + 6  # read by the second rank


def test_rollback_skips_the_samples_and_resumes_exactly(tmp_path: Path, corpus: Path) -> None:
    guards = {"non_finite": "rollback"}
    planted = Planted(samples=(BAD_SAMPLE,))
    whole, killed = (guarded(tmp_path / name, corpus, guards) for name in ("whole", "killed"))
    runs = [
        (str(whole), list[str](), planted),
        (str(killed), [], Planted(samples=(BAD_SAMPLE,), dies_at=(2 * EVERY, 2))),
        (str(killed), [], planted),
    ]
    assert run_ranks(run_once, 2, runs) == [["", "killed", ""]] * 2

    run = tmp_path / "whole" / "small"
    trained = train_records(run)
    assert [record["step"] for record in trained] == list(range(1, STEPS + 1))
    assert all(record["loss"] is not None and not record["skipped"] for record in trained)
    (guard,), (back,) = events(run, "guard"), events(run, "rollback")
    assert (guard["action"], guard["reason"], guard["step"]) == ("rollback", "loss", BAD_STEP + 1)
    skipped = range(2 * EVERY * BATCH, (BAD_STEP + 1) * BATCH)
    assert (back["from_step"], back["to_step"]) == (BAD_STEP + 1, 2 * EVERY)
    assert back["skipped_samples"] == len(skipped)
    read = [sample for record in trained for sample in record["sample_ids"]]
    kept = [sample for sample in range(STEPS * BATCH) if sample not in skipped]
    assert read == kept + kept[: len(skipped)]
    aside = rolled_back(run)
    assert [record["step"] for record in aside] == list(range(2 * EVERY + 1, BAD_STEP + 2))
    assert aside[-1]["loss"] is None

    # The process that died right after the rollback went on as the one that lived, and did not roll back again.
    assert len(events(tmp_path / "killed" / "small", "rollback")) == 1
    assert train_records(tmp_path / "killed" / "small") == trained


@pytest.mark.parametrize(
    "sections",
    [
        {"tail": "recycle"},
        {
            "curriculum": {
                "pacing": "adaptive",
                "start": 8,
                "fastest": {"steps": 4},
                "slowest": {"steps": 12},
                "interval": 3,
                "smoothing": 2,
            },
            "learning_rate": {"peak": 3e-3, "warmup": {"steps": 5}, "decay": "constant"},
        },
    ],
)
def test_rollback_with_other_plans_resumes_exactly(tmp_path: Path, corpus: Path, sections: dict[str, Any]) -> None:
    guards = {"loss_ratio": {"above": 3.0, "action": "rollback"}}
    planted = Planted(steps=(BAD_STEP,), times=1, factor=30.0)
    whole, killed = (guarded(tmp_path / name, corpus, guards, **sections) for name in ("whole", "killed"))
    died = Planted(steps=(BAD_STEP,), times=1, factor=30.0, dies_at=(2 * EVERY, 2))
    runs = [(str(whole), list[str](), planted), (str(killed), [], died), (str(killed), [], Planted())]
    assert run_ranks(run_once, 2, runs) == [["", "killed", ""]] * 2
    trained = train_records(tmp_path / "whole" / "small")
    assert train_records(tmp_path / "killed" / "small") == trained
    aside = rolled_back(tmp_path / "whole" / "small")
    assert [record["step"] for record in aside] == list(range(2 * EVERY + 1, BAD_STEP + 2))
    again = trained[2 * EVERY : BAD_STEP + 1]
    given_up, read = ({i for record in part for i in record["sample_ids"]} for part in (aside, trained[2 * EVERY :]))
    assert not given_up & read
    assert [record["seq_len"] for record in again] == [record["seq_len"] for record in aside]
    assert [record["offsets"] for record in again] == [record["offsets"] for record in aside]


def test_skip_and_log(tmp_path: Path, corpus: Path) -> None:
    exploding = Planted(samples=(BAD_SAMPLE,), factor=30.0)
    skip = guarded(tmp_path / "skip", corpus, {"loss_ratio": {"above": 3.0, "action": "skip"}})
    log = guarded(tmp_path / "log", corpus, {"loss_ratio": {"above": 3.0, "action": "log"}, "non_finite": "log"})
    off = guarded(tmp_path / "off", corpus, {})
    runs = [(str(path), list[str](), exploding) for path in (skip, log, off)]
    assert run_ranks(run_once, 2, runs) == [["", "", ""]] * 2
    skipped, logged, plain = (train_records(tmp_path / name / "small") for name in ("skip", "log", "off"))
    assert [record["step"] for record in skipped if record["skipped"]] == [BAD_STEP + 1]
    assert skipped[: BAD_STEP + 1] == [*plain[:BAD_STEP], plain[BAD_STEP] | {"skipped": True}]
    assert skipped[BAD_STEP + 1]["loss"] != plain[BAD_STEP + 1]["loss"]
    assert logged == plain, "a guard that logs changes nothing"
    for name, action in (("skip", "skip"), ("log", "log")):
        (event,) = events(tmp_path / name / "small", "guard")
        assert (event["action"], event["reason"], event["step"]) == (action, "loss_ratio", BAD_STEP + 1)
        assert event["value"] == plain[BAD_STEP]["loss_ratio"] > 3
    assert events(tmp_path / "off" / "small", "guard") == []


def test_stop_saves_what_was_good_and_goes_on_when_started_again(tmp_path: Path, corpus: Path) -> None:
    stop = guarded(tmp_path / "stop", corpus, {"non_finite": "stop"})
    skip = guarded(tmp_path / "skip", corpus, {"non_finite": "skip"})
    planted = Planted(samples=(BAD_SAMPLE,))
    runs = [(str(stop), list[str](), planted), (str(stop), [], planted), (str(skip), [], planted)]
    ends = run_ranks(run_once, 2, runs)
    assert ends[0] == ends[1]
    message = ends[0][0]
    assert f"stopped the run at step {BAD_STEP + 1}: the loss is not finite" in message
    assert f"step_{BAD_STEP + 1} holds the weights without that step's update" in message
    assert ends[0][1:] == ["", ""]
    # Leaving out an update and going on in another process is leaving out an update.
    assert train_records(tmp_path / "stop" / "small") == train_records(tmp_path / "skip" / "small")


def test_rollbacks_that_do_not_help_end(tmp_path: Path, corpus: Path) -> None:
    again = guarded(tmp_path / "again", corpus, {"non_finite": "rollback", "max_rollbacks": 2})
    early = guarded(tmp_path / "early", corpus, {"non_finite": "rollback"})
    runs = [(str(again), list[str](), Planted(steps=(BAD_STEP,))), (str(early), [], Planted(steps=(1,)))]
    ends = run_ranks(run_once, 2, runs)
    assert ends[0] == ends[1]
    assert "guards.max_rollbacks: the run was rolled back 2 times" in ends[0][0]
    assert f"step_{2 * EVERY} is the newest checkpoint" in ends[0][0]
    run = tmp_path / "again" / "small"
    assert [event["action"] for event in events(run, "guard")] == ["rollback", "rollback", "stop"]
    assert [event["skipped_samples"] for event in events(run, "rollback")] == [3 * BATCH, 3 * BATCH]
    assert "no checkpoint from before it" in ends[0][1]
    assert not (tmp_path / "early" / "small" / "checkpoints").exists()


NO_ZERO = {"zero_stage": 0, "micro_batch_tokens": 64}


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, corpus: Path) -> None:
    guards: list[dict[str, Any]] = [{"non_finite": "log"}, {}]
    configs = [guarded(tmp_path / name, corpus, g, parallel=NO_ZERO) for name, g in zip("ab", guards, strict=True)]
    ends = run_ranks(run_once, 2, [(str(config), list[str](), Planted(weight_at=BAD_STEP)) for config in configs])
    assert ends[0] == ends[1]
    for name, end, first in zip("ab", ends[0], ("log", "skip"), strict=True):
        assert f"weights are not finite at the last step, {STEPS}, so they are not saved" in end
        run = tmp_path / name / "small"
        events_found = [(event["action"], event["reason"]) for event in events(run, "guard")]
        # The guard that logs, and without one the run itself.
        logged = [("log", "loss")] if first == "log" else []
        assert sorted(events_found) == sorted([*logged, ("skip", "loss"), *[("no checkpoint", "weights")] * 2])
        assert (run / "checkpoints" / "latest").read_text() == f"step_{2 * EVERY}\n"
        assert all(record["skipped"] for record in train_records(run)[BAD_STEP:])


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_that_stay_broken_end_the_run(tmp_path: Path, corpus: Path, stage: int) -> None:
    layout = {"zero_stage": stage, "micro_batch_tokens": 64}
    config = guarded(tmp_path / "off", corpus, {"max_non_finite": 4}, parallel=layout)
    # Two steps that are left out and are forgotten, then one after the other.
    planted = Planted(steps=(1, 2, *range(BAD_STEP, STEPS)))
    ends = run_ranks(run_once, 2, [(str(config), list[str](), planted)])
    assert ends[0] == ends[1]
    last = BAD_STEP + 4
    assert f"stopped the run at step {last}: the loss is not finite; guards.max_non_finite: 4 updates" in ends[0][0]
    assert f"step_{3 * EVERY} is the newest checkpoint" in ends[0][0]
    run = tmp_path / "off" / "small"
    skipped = [record["step"] for record in train_records(run) if record["skipped"]]
    assert skipped == [2, 3, *range(BAD_STEP + 1, last + 1)]
    assert [(event["action"], event["step"]) for event in events(run, "guard")] == [
        ("skip", 2),
        ("skip", BAD_STEP + 1),
        ("stop", last),
    ]


def test_a_resumed_run_counts_on(tmp_path: Path, corpus: Path) -> None:
    config = guarded(tmp_path / "off", corpus, {"max_non_finite": 5})
    planted = Planted(steps=tuple(range(BAD_STEP, STEPS)))
    stop = ['training.stop_after={"steps": 12}']
    ends = run_ranks(run_once, 2, [(str(config), stop, planted), (str(config), list[str](), planted)])
    assert ends[0] == ends[1]
    assert ends[0][0] == ""
    assert f"stopped the run at step {BAD_STEP + 5}: " in ends[0][1]


def test_copies_that_differ_end_the_run(tmp_path: Path, corpus: Path) -> None:
    one_bit = Planted(weight_at=BAD_STEP, factor=0.125)
    checked, whole = (
        guarded(tmp_path / name, corpus, {"check_copies_every": 3}, parallel=NO_ZERO) for name in ("checked", "whole")
    )
    ends = run_ranks(run_once, 2, [(str(checked), list[str](), one_bit), (str(whole), [], Planted())])
    assert ends[0] == ends[1]
    message, nothing = ends[0]
    assert nothing == "", "copies of a healthy run are equal"
    # Gradients are averaged over the ranks, so the other weights stay equal.
    name = "embedding.word_embeddings.weight"
    assert message.startswith(f"the copies of {name} are not equal after step 12: rank 0 against rank 1. ")
    assert f"step_{2 * EVERY} is the newest checkpoint" in message


@pytest.mark.slow
def test_a_stopped_run_exits_with_one_message(tmp_path: Path, corpus: Path) -> None:
    guards = {"loss_ratio": {"above": 1.05, "action": "stop"}}
    config = guarded(tmp_path / "cli", corpus, guards, learning_rate={"peak": 1.0, "decay": "constant"})
    done = cli("train", str(config), "--nproc", "2")
    assert done.returncode == 1
    assert done.stderr.count("a guard stopped the run at step") == 1
    assert "Traceback" not in done.stderr
    run = tmp_path / "cli" / "small"
    (event,) = events(run, "guard")
    assert (run / "checkpoints" / "latest").read_text() == f"step_{event['step']}\n"
    assert train_records(run)[-1]["skipped"]
