"""The search on real probes: runs each as a run of its own, watches its metrics, and ends it when it is decided."""

import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.metrics.jsonl import FILE_NAME, Metrics, read_metrics
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.tuning.problem import Problem, probe_name
from megatron_ext.tuning.runner import Runner
from megatron_ext.tuning.search import Candidate, Grid, Outcome, next_step
from megatron_ext.tuning.state import ProbeResult, read_results, write_results
from megatron_ext.tuning.verdict import Point, judge

_POLL_SECONDS = 0.5
_SHOWN_LINES = 15


class ProbeError(RuntimeError):
    """A probe ended with an error that is no fluctuation."""


@dataclass(frozen=True)
class Tuning:
    """A search in its directory."""

    problem: Problem
    grid: Grid
    folder: Path
    """Holds tune.json, the probes' run directories and the results."""

    runner: Runner

    def results(self) -> dict[Candidate, ProbeResult]:
        """Finished probes.

        Raises:
            UserError: they belong to another search.
        """
        return read_results(self.folder, self.problem.identity())

    def next(self) -> Candidate | Outcome:
        """The probe to run next, or the outcome."""
        return next_step(self.grid, {candidate: result.verdict for candidate, result in self.results().items()})

    def run(self, stop: StopRequest) -> Iterator[Candidate | ProbeResult]:
        """Run probes until the outcome is known or ``stop`` asks to end.

        Yields each candidate before it is probed and its result after. A probe that ``stop`` interrupts has saved a
        checkpoint; it goes on in the next call.

        Raises:
            UserError: the finished probes belong to another search, or a probe's config is refused.
            ProbeError: a probe ended with an error.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while not stop.requested and isinstance(candidate := self.next(), Candidate):
            yield candidate
            result = self._probe(candidate, stop)
            if result is None:
                return
            write_results(self.folder, self.problem.identity(), self.results() | {candidate: result})
            yield result

    def _probe(self, candidate: Candidate, stop: StopRequest) -> ProbeResult | None:
        """Train a probe to its verdict; None if it was interrupted before."""
        probes = self.folder / "probes"
        probes.mkdir(exist_ok=True)
        config = self.problem.probe_config(candidate, output_dir=str(probes))
        output = probes / f"{probe_name(candidate)}.out"
        last = min(self.problem.settings.steps, self.problem.plan(candidate).steps)
        status = 0
        if not self._decided(config, candidate, last=last):
            with closing(self.runner.start(config, output=output)) as job:
                asked = False
                while (polled := job.poll()) is None:
                    began = time.monotonic()
                    if not asked and (stop.requested or not self._judged(config, candidate).verdict.stable):
                        asked = job.ask_to_stop()
                    # Reading a long file again and again must not take the time of the ranks.
                    time.sleep(max(_POLL_SECONDS, 10 * (time.monotonic() - began)))
                status = polled
        if self._decided(config, candidate, last=last):
            # A verdict is all that is wanted of a probe, and its checkpoints may be many times the size of the rest.
            shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)
            return self._judged(config, candidate)
        if stop.requested:
            return None
        raise _failure(candidate, status, output)

    def _decided(self, config: RunConfig, candidate: Candidate, *, last: int) -> bool:
        """Whether the probe's metrics hold a fluctuation or its last validation."""
        result = self._judged(config, candidate)
        return not result.verdict.stable or bool(result.points and result.points[-1].step >= last)

    def _judged(self, config: RunConfig, candidate: Candidate) -> ProbeResult:
        metrics = _metrics(config.run_dir)
        points = tuple(Point(record.step, record.perplexity) for record in metrics.evaluations)
        verdict = judge(
            points,
            threshold=self.problem.settings.threshold,
            initial=float(config.model.vocab_size),
            tokens=metrics.train[-1].tokens if metrics.train else 0,
            # A step that fp16's loss scale left out did no harm.
            broken_steps=[r.step for r in metrics.train if not r.skipped and not math.isfinite(r.loss)],
        )
        return ProbeResult(candidate, verdict, points)


def _metrics(run_dir: Path) -> Metrics:
    if not (run_dir / FILE_NAME).is_file():
        return Metrics(train=(), evaluations=(), events=())
    return read_metrics(run_dir)


def _failure(candidate: Candidate, status: int, output: Path) -> Exception:
    with output.open(encoding="utf-8", errors="replace") as file:
        tail = "".join(deque(file, maxlen=_SHOWN_LINES))
    text = f"the probe of s = {candidate.start}, T = {candidate.duration:,} ended with status {status}; {output} says\n"
    return UserError(text + tail) if status == 2 else ProbeError(text + tail)
