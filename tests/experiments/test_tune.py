"""The search on probes that a made-up machine runs: what is started, stopped, kept and gone on with."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_ext.experiments.tune
from megatron_ext.config.loading import parse_layers
from megatron_ext.config.merging import ConfigLayer
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.experiments.tune import FILE_NAME, ProbeError, ProbeResult, Tuning, read_results, write_results
from megatron_ext.experiments.tune_search import Candidate, Outcome, Point, Verdict
from megatron_ext.experiments.tune_space import DurationSpacing, ProbeSettings, TuneRun, grid_of
from megatron_ext.metrics.jsonl import JsonlSink
from megatron_ext.metrics.records import EvalRecord
from megatron_ext.runtime.signals import StopRequest
from tests.config.builders import small_tree
from tests.metrics.test_records import train_record

SETTINGS = ProbeSettings(threshold=1.3, steps=20, validate_every=2, validation_samples=4)
LIMIT = 40


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_ext.experiments.tune, "_POLL_SECONDS", 0.0)


@dataclass
class FakeJob:
    """Trains one step each time it is polled; goes on after the steps that are recorded already."""

    config: RunConfig
    fluctuates_at: int | None
    ends_with: int | None = None
    """Exit status with which it ends at once."""
    stopping: bool = False
    closed: bool = False

    def poll(self) -> int | None:
        if self.ends_with is not None:
            return self.ends_with
        plan, step = self.config.plan(), self.trained()
        if self.stopping or step >= plan.steps_within(self.config.training.stop_after):
            return 0
        sink = JsonlSink(self.config.run_dir / "metrics.jsonl")
        tokens = plan.tokens_at_step(step + 1)
        sink.train(train_record(step=step + 1, tokens=tokens, loss=3.0))
        if (step + 1) % 2 == 0:
            loss = 5.0 if self.fluctuates_at is not None and step + 1 >= self.fluctuates_at else 4.0 - step / 100
            sink.evaluation(EvalRecord.from_loss(step=step + 1, tokens=tokens, loss=loss))
        sink.close()
        (self.config.run_dir / "checkpoints").mkdir(exist_ok=True)
        return None

    def trained(self) -> int:
        file = self.config.run_dir / "metrics.jsonl"
        return sum('"train"' in line for line in file.read_text().splitlines()) if file.exists() else 0

    def ask_to_stop(self) -> bool:
        self.stopping = True
        return True

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeRunner:
    """Probes with T above LIMIT fluctuate at step 7."""

    started: list[str] = field(default_factory=list)
    ends_with: int | None = None
    on_start: Callable[[], None] | None = None

    def start(self, config: RunConfig, *, output: Path) -> FakeJob:
        output.write_text("something went wrong\n")
        self.started.append(config.name)
        if self.on_start is not None:
            self.on_start()
        duration = config.model_dump()["curriculum"]["duration"]["steps"]
        return FakeJob(config, 7 if duration > LIMIT else None, ends_with=self.ends_with)


def tuning(folder: Path, runner: FakeRunner, *, settings: ProbeSettings = SETTINGS) -> Tuning:
    layers = (ConfigLayer("run.json", small_tree(learning_rate={"peak": 1e-3, "warmup": {"steps": 10}})),)
    tune_run = TuneRun(layers, parse_layers(layers), settings)
    spacing = DurationSpacing(unit=10, ratio=1.25, first=2, given=(10, 20, 30, 40, 50, 60, 70, 80))
    return Tuning(tune_run, grid_of(tune_run, (8, 16), spacing, beginning=6), folder=folder, runner=runner)


def finish(search: Tuning) -> list[ProbeResult]:
    return [event for event in search.run(StopRequest()) if isinstance(event, ProbeResult)]


def test_probes_are_run_until_the_outcome_and_stop_at_a_fluctuation(tmp_path: Path) -> None:
    runner = FakeRunner()
    search = tuning(tmp_path / "out", runner)
    results = finish(search)
    outcome = search.next()
    assert isinstance(outcome, Outcome)
    assert outcome.best == Candidate(8, 40)
    assert runner.started == ["s8_T20", "s8_T50", "s8_T30", "s8_T40"]
    by_name = {(r.candidate.duration): r for r in results}
    assert [point.step for point in by_name[40].points] == list(range(2, 21, 2))
    assert by_name[40].verdict.tokens == search.tune_run.probe_tokens(Candidate(8, 40))
    assert by_name[50].verdict.fluctuated_at == 8
    assert by_name[50].points[-1].step == 8, "stopped at the fluctuation"
    assert by_name[50].verdict.tokens == search.tune_run.probe_tokens(Candidate(8, 50), steps=8)
    assert not list((tmp_path / "out" / "probes").glob("*/checkpoints")), "only metrics are kept"


def test_finished_probes_are_not_run_again(tmp_path: Path) -> None:
    finish(tuning(tmp_path, FakeRunner()))
    again = FakeRunner()
    search = tuning(tmp_path, again)
    assert finish(search) == []
    assert again.started == []
    assert isinstance(search.next(), Outcome)
    # Forgotten results are read from the probes' metrics: nothing is trained for them.
    (tmp_path / FILE_NAME).unlink()
    assert len(finish(search)) == 4
    assert again.started == []


def test_an_interrupted_probe_goes_on(tmp_path: Path) -> None:
    stop, runner = StopRequest(), FakeRunner()
    events = []
    for event in tuning(tmp_path, runner).run(stop):
        events.append(event)
        if len(runner.started) == 1:
            # Asked while the second probe is about to start.
            runner.on_start = lambda: setattr(stop, "signal_name", "SIGINT")
    assert isinstance(events[-1], Candidate)
    assert events[-1].duration == 50
    interrupted = tmp_path / "probes" / "s8_T50"
    assert (interrupted / "checkpoints").is_dir(), "it has to go on from there"
    again = FakeRunner()
    results = finish(tuning(tmp_path, again))
    assert again.started == ["s8_T50", "s8_T30", "s8_T40"]
    assert results[0].verdict.fluctuated_at == 8
    steps = [json.loads(line)["step"] for line in (interrupted / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_probe_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"s = 8, T = 20 ended with status 1.*\nsomething went wrong"):
        finish(tuning(tmp_path, FakeRunner(ends_with=1)))
    with pytest.raises(UserError, match="status 2"):
        finish(tuning(tmp_path, FakeRunner(ends_with=2)))
    assert finish(tuning(tmp_path, FakeRunner())), "a failure is no verdict"


def test_results_of_another_search_are_refused(tmp_path: Path) -> None:
    finish(tuning(tmp_path, FakeRunner()))
    other = ProbeSettings(threshold=1.5, steps=20, validate_every=2, validation_samples=4)
    with pytest.raises(UserError, match=r"settings\.threshold is 1\.3 there and 1\.5 here.*--output"):
        finish(tuning(tmp_path, FakeRunner(), settings=other))


numbers = st.floats(min_value=0) | st.just(math.nan)
results = st.builds(
    ProbeResult,
    candidate=st.builds(Candidate, start=st.integers(1, 999), duration=st.integers(1, 10**6)),
    verdict=st.builds(
        Verdict,
        fluctuated_at=st.none() | st.integers(1, 10**6),
        worst_ratio=st.floats(min_value=0),
        tokens=st.integers(0, 10**12),
    ),
    points=st.lists(st.builds(Point, step=st.integers(1, 10**6), perplexity=numbers), max_size=4).map(tuple),
)


@given(st.lists(results, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, found: list[ProbeResult]) -> None:
    folder = tmp_path_factory.mktemp("state")
    written = {result.candidate: result for result in found}
    identity = {"settings": {"split": (1, 2)}}
    write_results(folder, identity, written)
    json.loads((folder / FILE_NAME).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    # NaN differs from itself, so texts are compared.
    assert repr(read_results(folder, identity)) == repr(written)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 1, "probes": [{}], "identity": {}}', '{"format": 9}']
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(UserError, match=FILE_NAME):
        read_results(tmp_path, {})
    assert read_results(tmp_path / "nowhere", {}) == {}
