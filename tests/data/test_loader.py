"""Loaders: every step's tokens checked against the corpus, for any number of ranks, from any step, in any order."""

import gc
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.curriculum.segments import Phase, cut
from megatron_ext.data.datasets import Datasets, Samples
from megatron_ext.data.loader import Batch, Prefetcher, TrainLoader, ValidationLoader
from megatron_ext.errors import UserError
from tests.data.corpora import SEPARATOR, build, documents, run_config, whole, write_tokens

STEPS = 60
GROWING = {"pacing": "linear", "start": 4, "multiple": 4, "duration": {"steps": 20}}


@dataclass(frozen=True)
class Run:
    plan: TrainingPlan
    data: Datasets

    @cached_property
    def batches(self) -> list[Batch]:
        """Every step's batch, by the plainest loader there is."""
        return _batches(self, range(self.plan.steps), prefetch=0)


def _run(folder: Path, tail: str, **sections: Any) -> Run:
    prefix = write_tokens(folder / "corpus", documents(300))
    data = {"sources": [{"prefix": prefix}], "split": [90, 10, 0], "tail": tail}
    training = {"seq_len": 16, "batch_size": 12, "duration": {"steps": STEPS}}
    config = run_config(data, **{"training": training, "curriculum": GROWING, **sections})
    return Run(plan=config.plan(), data=build(config))


@pytest.fixture(scope="module")
def truncate(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(tmp_path_factory.mktemp("truncate"), "truncate")


@pytest.fixture(scope="module")
def recycle(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(tmp_path_factory.mktemp("recycle"), "recycle")


@pytest.fixture(params=["truncate", "recycle"])
def run(request: pytest.FixtureRequest) -> Run:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Run)
    return found


def _batches(run: Run, steps: range, **options: Any) -> list[Batch]:
    with TrainLoader(run.data.train, run.plan, **options) as loader:
        return [loader.batch(run.plan[step]) for step in steps]


def _assert_same(one: Batch, other: Batch) -> None:
    for name in ("tokens", "labels", "samples", "offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def _threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_batches_have_the_planned_shape(run: Run) -> None:
    for planned, batch in zip(run.plan, run.batches, strict=True):
        assert batch.tokens.shape == batch.labels.shape == (12, planned.seq_len)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert len(batch.samples) == len(batch.offsets) == 12
    assert {batch.tokens.shape[1] for batch in run.batches} == {4, 8, 12, 16}


def test_labels_are_the_next_tokens_of_the_corpus(run: Run) -> None:
    for batch in run.batches:
        tokens, labels = batch.tokens.numpy(), batch.labels.numpy()
        # Ids count up within a document: the label is known from the token alone, at a cut too.
        assert np.all((labels == tokens + 1) | (labels == SEPARATOR) | (tokens == SEPARATOR))


def test_truncate_reads_the_beginning_of_a_new_sample_for_every_sequence(truncate: Run) -> None:
    for step, batch in enumerate(truncate.batches):
        length = truncate.plan[step].seq_len
        for row in range(12):
            sample = whole(truncate.data.train, 12 * step + row)
            assert batch.tokens[row].tolist() == sample[:length].tolist()
            assert batch.labels[row].tolist() == sample[1 : length + 1].tolist()


def test_recycle_reads_every_token_of_every_sample_once(recycle: Run) -> None:
    batches = recycle.batches
    for stream in range(12):
        tokens = np.concatenate([batch.tokens[stream].numpy() for batch in batches])
        labels = np.concatenate([batch.labels[stream].numpy() for batch in batches])
        samples = [whole(recycle.data.train, index) for index in range(stream, recycle.plan.samples, 12)]
        expected = np.concatenate([sample[:-1] for sample in samples])
        np.testing.assert_array_equal(tokens, expected[: len(tokens)])
        np.testing.assert_array_equal(labels, np.concatenate([sample[1:] for sample in samples])[: len(labels)])
        assert len(expected) - len(tokens) < 16
    assert any(batch.offsets[0] + batch.tokens.shape[1] > 16 for batch in batches)  # some go on in the next sample


@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_any_number_of_ranks_has_the_same_global_batch(run: Run, ranks: int) -> None:
    parts = [_batches(run, range(STEPS), data_rank=rank, data_size=ranks) for rank in range(ranks)]
    for expected, *mine in zip(run.batches, *parts, strict=True):
        assert {batch.tokens.shape[0] for batch in mine} == {12 // ranks}
        tokens, labels = (torch.cat([getattr(batch, name) for batch in mine]) for name in ("tokens", "labels"))
        for batch in mine:
            _assert_same(replace(batch, tokens=tokens, labels=labels), expected)


@pytest.mark.parametrize("first", [1, 7, 33, 59])
def test_resumed_run_sees_what_the_uninterrupted_one_does(run: Run, first: int) -> None:
    for ours, theirs in zip(_batches(run, range(first, STEPS)), run.batches[first:], strict=True):
        _assert_same(ours, theirs)


def test_any_order_of_steps_gives_each_step_its_own(run: Run) -> None:
    with TrainLoader(run.data.train, run.plan, prefetch=2) as loader:
        for step in (5, 6, 6, 7, 3, 59, 0, 1, 2, 2, 40):
            _assert_same(loader.batch(run.plan[step]), run.batches[step])


def test_step_that_departs_from_the_plan_is_obeyed(run: Run) -> None:
    with TrainLoader(run.data.train, run.plan) as loader:
        loader.batch(run.plan[3])
        assert loader.batch(replace(run.plan[4], seq_len=16)).tokens.shape == (12, 16)
        _assert_same(loader.batch(replace(run.plan[5], lr=0.5)), run.batches[5])


def test_another_version_of_the_plan_is_followed_from_the_next_step_on(run: Run) -> None:
    held = [Phase(s.first_step, s.first_tokens, s.batch_size, s.seq_len) for s in run.plan.segments[:2]]
    other = replace(run.plan, segments=cut(held, run.plan.duration))
    assert other[8] == run.plan[8]
    assert other[30].seq_len < run.plan[30].seq_len
    expected = Run(plan=other, data=run.data).batches
    with TrainLoader(run.data.train, run.plan, prefetch=3) as loader:
        for step in range(9):
            _assert_same(loader.batch(run.plan[step]), expected[step])
        loader.follow(other)
        for step in range(9, STEPS):
            _assert_same(loader.batch(other[step]), expected[step])


def test_batch_that_does_not_divide_is_found_at_once(run: Run) -> None:
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

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def check_files(self) -> None:
        self.inner.check_files()

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, index: int, first: int, count: int) -> npt.NDArray[np.integer[Any]]:
        if index == self.bad:
            raise OSError("disk on fire")
        return self.inner.read(index, first, count)


def test_error_in_the_thread_is_raised_in_its_step(truncate: Run) -> None:
    plan = truncate.plan
    with TrainLoader(_Failing(truncate.data.train, bad=5 * 12 + 1), plan, prefetch=3) as loader:
        for step in range(5):
            loader.batch(plan[step])
        for _ in range(2):  # asking again fails again and does not hang
            with pytest.raises(OSError, match="disk on fire") as caught:
                loader.batch(plan[5])
            assert "in read" in "".join(traceback.format_tb(caught.value.__traceback__))
        _assert_same(loader.batch(plan[6]), truncate.batches[6])


def test_no_thread_is_left_when_the_run_stops_early(run: Run) -> None:
    with TrainLoader(run.data.train, run.plan, prefetch=2) as loader:
        loader.batch(run.plan[0])
        assert _threads() == 1
    assert _threads() == 0
    _assert_same(loader.batch(run.plan[1]), run.batches[1])  # it starts another
    loader.close()


@pytest.mark.parametrize("samples", [1, 5, 8])
def test_validation_covers_every_sample_once_in_equal_micro_batches(tmp_path: Path, samples: int) -> None:
    valid = _run(tmp_path, "truncate", validation={"samples": samples}).data.valid
    assert len(valid) == samples
    expected = [whole(valid, index) for index in range(samples)]
    for ranks in (1, 2, 3, 4, 7):
        loaders = [ValidationLoader(valid, 3 * 16, data_rank=rank, data_size=ranks) for rank in range(ranks)]
        (sizes,) = {loader.sizes for loader in loaders}
        assert max(sizes) <= 3
        seen: list[tuple[Any, Any]] = []
        for loader in loaders:
            batches = list(loader)
            assert [len(batch.tokens) for batch in batches] == list(sizes)
            assert len(batches) == len(loader)
            for batch in batches:
                assert batch.tokens.shape == batch.labels.shape == (len(batch.weights), 16)
                assert set(batch.weights.tolist()) <= {0.0, 1.0}
                real = batch.weights.bool()
                seen += zip(batch.tokens[real].tolist(), batch.labels[real].tolist(), strict=True)
        assert seen == [(sample[:-1].tolist(), sample[1:].tolist()) for sample in expected]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_prefetching_is_bounded() -> None:
    made: list[int] = []
    prefetcher = Prefetcher(made.append, range(100), depth=3)
    _wait_until(lambda: len(made) == 3)
    time.sleep(0.05)
    assert len(made) == 3
    prefetcher.next()
    _wait_until(lambda: len(made) == 4)
    prefetcher.close()


def test_forgotten_prefetcher_ends_its_thread() -> None:
    prefetcher = Prefetcher(lambda n: n, range(1000), depth=1)
    prefetcher.next()
    assert _threads() == 1
    del prefetcher
    gc.collect()
    _wait_until(lambda: _threads() == 0)
