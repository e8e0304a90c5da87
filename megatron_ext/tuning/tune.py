"""The search on real probes: runs each as a run of its own, watches its metrics, and ends it when it is decided."""

import json
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.metrics.jsonl import FILE_NAME, Column, read_columns
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
        file, output = probes / f"{probe_name(candidate)}.json", probes / f"{probe_name(candidate)}.out"
        file.write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
        last = min(self.problem.settings.steps, self.problem.plan(candidate).steps)
        status = 0
        if not self._decided(config, candidate, last=last):
            with closing(self.runner.start(file, output=output)) as job:
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
        train, valid = _columns(config.run_dir)
        steps, perplexities = valid["step"].astype(int).tolist(), valid["perplexity"].tolist()
        points = tuple(map(Point, steps, perplexities))
        # A step that fp16's loss scale left out did no harm.
        broken = ~np.isfinite(train["loss"]) & (train["skipped"] != 1)
        verdict = judge(
            points,
            threshold=self.problem.settings.threshold,
            initial=float(config.model.vocab_size),
            tokens=int(train["tokens"][-1]) if len(train["tokens"]) else 0,
            broken_steps=train["step"][broken].astype(int).tolist(),
        )
        return ProbeResult(candidate, verdict, points)


def _columns(run_dir: Path) -> tuple[dict[str, Column], dict[str, Column]]:
    """What is needed of a probe's train and eval records, of none where it has not begun."""
    train, valid = ("step", "tokens", "loss", "skipped"), ("step", "perplexity")
    if not (run_dir / FILE_NAME).is_file():
        return {name: np.empty(0) for name in train}, {name: np.empty(0) for name in valid}
    return read_columns(run_dir, train), read_columns(run_dir, valid, kind="eval")


def _failure(candidate: Candidate, status: int, output: Path) -> Exception:
    with output.open(encoding="utf-8", errors="replace") as file:
        tail = "".join(deque(file, maxlen=_SHOWN_LINES))
    text = f"the probe of s = {candidate.start}, T = {candidate.duration:,} ended with status {status}; {output} says\n"
    return UserError(text + tail) if status == 2 else ProbeError(text + tail)
