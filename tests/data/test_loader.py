"""Loaders: every step's tokens checked against the corpus, for any number of ranks, from any step, in any order."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.curriculum.segments import Phase, cut
from megatron_ext.data.datasets import Datasets, Samples, build_datasets
from megatron_ext.data.loader import Batch, TrainLoader, ValidationLoader
from megatron_ext.errors import UserError
from tests.data.corpora import SEPARATOR, documents, run_config, whole, write_tokens

GROWING = {"pacing": "linear", "start": 4, "multiple": 4, "duration": {"steps": 20}}


@dataclass(frozen=True)
class Run:
    plan: TrainingPlan
    data: Datasets


def _run(tmp_path: Path, tail: str, **sections: Any) -> Run:
    prefix = write_tokens(tmp_path / "corpus", documents(300))
    data = {"sources": [{"prefix": prefix}], "split": [90, 10, 0], "tail": tail}
    training = {"seq_len": 16, "batch_size": 12, "duration": {"steps": 60}}
    config = run_config(data, **{"training": training, "curriculum": GROWING, **sections})
    plan = config.plan()
    return Run(plan=plan, data=build_datasets(config, plan))


@pytest.fixture(params=["truncate", "recycle"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    return _run(tmp_path, request.param)


def _batches(run: Run, steps: range, **options: Any) -> list[Batch]:
    with TrainLoader(run.data.train, run.plan, **options) as loader:
        return [loader.batch(run.plan[step]) for step in steps]


def _assert_same(one: Batch, other: Batch) -> None:
    for name in ("tokens", "labels", "samples", "offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_batches_have_the_planned_shape(run: Run) -> None:
    lengths = set()
    for step, batch in enumerate(_batches(run, range(60))):
        planned = run.plan[step]
        assert batch.tokens.shape == batch.labels.shape == (12, planned.seq_len)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert len(batch.samples) == len(batch.offsets) == 12
        lengths.add(planned.seq_len)
    assert lengths == {4, 8, 12, 16}


def test_labels_are_the_next_tokens_of_the_corpus(run: Run) -> None:
    for batch in _batches(run, range(60)):
        tokens, labels = batch.tokens.numpy(), batch.labels.numpy()
        # Ids count up within a document: the label is known from the token alone, at a cut too.
        assert np.all((labels == tokens + 1) | (labels == SEPARATOR) | (tokens == SEPARATOR))


def test_truncate_reads_the_beginning_of_a_new_sample_for_every_sequence(tmp_path: Path) -> None:
    run = _run(tmp_path, "truncate")
    drawn = 0
    for step, batch in enumerate(_batches(run, range(60))):
        length = run.plan[step].seq_len
        for row in range(12):
            sample = whole(run.data.train, drawn + row)
            assert batch.tokens[row].tolist() == sample[:length].tolist()
            assert batch.labels[row].tolist() == sample[1 : length + 1].tolist()
        drawn += 12


def test_recycle_reads_every_token_of_every_sample_once(tmp_path: Path) -> None:
    run = _run(tmp_path, "recycle")
    batches = _batches(run, range(60))
    for lane in range(12):
        tokens = np.concatenate([batch.tokens[lane].numpy() for batch in batches])
        labels = np.concatenate([batch.labels[lane].numpy() for batch in batches])
        samples = [whole(run.data.train, index) for index in range(lane, run.plan.samples, 12)]
        expected = np.concatenate([sample[:-1] for sample in samples])
        np.testing.assert_array_equal(tokens, expected[: len(tokens)])
        np.testing.assert_array_equal(labels, np.concatenate([sample[1:] for sample in samples])[: len(labels)])
        assert len(expected) - len(tokens) < 16
    assert any(batch.offsets[0] + batch.tokens.shape[1] > 16 for batch in batches)  # some go on in the next sample


def test_any_number_of_ranks_has_the_same_global_batch(run: Run) -> None:
    alone = _batches(run, range(60))
    for ranks in (2, 3, 12):
        parts = [_batches(run, range(60), data_rank=rank, data_size=ranks) for rank in range(ranks)]
        for step, expected in enumerate(alone):
            mine = [part[step] for part in parts]
            assert {batch.tokens.shape[0] for batch in mine} == {12 // ranks}
            joined = replace(
                mine[0],
                tokens=torch.cat([batch.tokens for batch in mine]),
                labels=torch.cat([batch.labels for batch in mine]),
            )
            _assert_same(joined, expected)
            _assert_same(replace(mine[-1], tokens=expected.tokens, labels=expected.labels), expected)


@pytest.mark.parametrize("first", [1, 7, 33, 59])
def test_resumed_run_sees_what_the_uninterrupted_one_does(run: Run, first: int) -> None:
    for ours, theirs in zip(_batches(run, range(first, 60)), _batches(run, range(60))[first:], strict=True):
        _assert_same(ours, theirs)


def test_any_order_of_steps_gives_each_step_its_own(run: Run) -> None:
    expected = _batches(run, range(60), prefetch=0)
    order = [5, 6, 6, 7, 3, 59, 0, 1, 2, 2, 40]
    with TrainLoader(run.data.train, run.plan, prefetch=2) as loader:
        for step in order:
            _assert_same(loader.batch(run.plan[step]), expected[step])


def test_step_that_departs_from_the_plan_is_obeyed(run: Run) -> None:
    with TrainLoader(run.data.train, run.plan) as loader:
        loader.batch(run.plan[3])
        changed = replace(run.plan[4], seq_len=16)
        assert loader.batch(changed).tokens.shape == (12, 16)
        other_rate = replace(run.plan[5], lr=0.5)
        _assert_same(loader.batch(other_rate), _batches(run, range(5, 6))[0])


def test_another_version_of_the_plan_is_followed_from_the_next_step_on(run: Run) -> None:
    held = [Phase(s.first_step, s.first_tokens, s.batch_size, s.seq_len) for s in run.plan.segments[:2]]
    other = replace(run.plan, segments=cut(held, run.plan.duration))
    assert other[8] == run.plan[8]
    assert other[30].seq_len < run.plan[30].seq_len
    expected = _batches(replace(run, plan=other), range(60), prefetch=0)
    with TrainLoader(run.data.train, run.plan, prefetch=3) as loader:
        for step in range(9):
            _assert_same(loader.batch(run.plan[step]), expected[step])
        loader.follow(other)
        for step in range(9, 60):
            _assert_same(loader.batch(other[step]), expected[step])


def test_samples_repeat_only_after_the_whole_corpus(tmp_path: Path) -> None:
    run = _run(tmp_path, "truncate", training={"seq_len": 16, "batch_size": 12, "duration": {"steps": 200}})
    per_pass = (sum(map(len, documents(300)[:270])) - 1) // 16
    assert run.plan.samples > 4 * per_pass
    batches = _batches(run, range(200))
    ids = np.concatenate([batch.samples for batch in batches])
    np.testing.assert_array_equal(ids, np.arange(2400))
    assert batches[-1].tokens.min() >= 0


def test_batch_that_does_not_divide_is_told_at_once(run: Run) -> None:
    with pytest.raises(UserError, match="12 sequences does not divide evenly over 5 data-parallel ranks"):
        TrainLoader(run.data.train, run.plan, data_size=5)


@dataclass(frozen=True)
class _Failing:
    """Samples of which one cannot be read."""

    inner: Samples
    bad: int

    @property
    def seq_len(self) -> int:
        return self.inner.seq_len

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, index: int, first: int, count: int) -> npt.NDArray[np.integer[Any]]:
        if index == self.bad:
            raise OSError("disk on fire")
        return self.inner.read(index, first, count)


def test_error_in_the_thread_is_raised_in_its_step(tmp_path: Path) -> None:
    run = _run(tmp_path, "truncate")
    with TrainLoader(_Failing(run.data.train, bad=5 * 12 + 1), run.plan, prefetch=3) as loader:
        for step in range(5):
            loader.batch(run.plan[step])
        for _ in range(2):  # asking again fails again and does not hang
            with pytest.raises(OSError, match="disk on fire"):
                loader.batch(run.plan[5])
        _assert_same(loader.batch(run.plan[6]), _batches(run, range(6, 7))[0])


def test_no_thread_is_left_when_the_run_stops_early(run: Run) -> None:
    with TrainLoader(run.data.train, run.plan, prefetch=2) as loader:
        loader.batch(run.plan[0])
        assert any(thread.name == "prefetch" for thread in threading.enumerate())
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    _assert_same(loader.batch(run.plan[1]), _batches(run, range(1, 2))[0])
    loader.close()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("samples", [1, 5, 8])
def test_validation_covers_every_sample_once_in_equal_micro_batches(tmp_path: Path, ranks: int, samples: int) -> None:
    valid = _run(tmp_path, "truncate", validation={"samples": samples}).data.valid
    assert len(valid) == samples
    loaders = [ValidationLoader(valid, 3 * 16, data_rank=rank, data_size=ranks) for rank in range(ranks)]
    assert len({loader.sizes for loader in loaders}) == 1
    seen = []
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader)
        assert [len(batch.tokens) for batch in batches] == list(loader.sizes)
        assert max(loader.sizes) <= 3
        for batch in batches:
            assert batch.tokens.shape == batch.labels.shape == (len(batch.weights), 16)
            seen += [
                (row.tolist(), labels.tolist())
                for row, labels, weight in zip(batch.tokens, batch.labels, batch.weights, strict=True)
                if weight
            ]
    assert sum(float(batch.weights.sum()) for loader in loaders for batch in loader) == samples
    expected = [whole(valid, index) for index in range(samples)]
    assert seen == [(sample[:-1].tolist(), sample[1:].tolist()) for sample in expected]
