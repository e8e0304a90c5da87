"""The search for start length and duration on real probes: each is a run, watched, and ended when it is decided.

Finished probes stand in ``tune.json`` of the search's directory, so that a search goes on where it stopped.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.base import describe_differences
from megatron_ext.errors import UserError
from megatron_ext.experiments.tune_jobs import Runner
from megatron_ext.experiments.tune_search import Candidate, Grid, Outcome, Point, Verdict, next_step, verdict_of
from megatron_ext.experiments.tune_space import TuneRun, probe_name
from megatron_ext.metrics.reading import Column, read_columns
from megatron_ext.metrics.records import FILE_NAME as METRICS_FILE
from megatron_ext.runtime.files import replace_text
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.text import spell_non_finite

FILE_NAME = "tune.json"
_FORMAT = 1


@dataclass(frozen=True)
class ProbeResult:
    """A finished probe."""

    candidate: Candidate
    verdict: Verdict
    points: tuple[Point, ...]
    """Its validations."""


def read_results(folder: Path, identity: dict[str, Any]) -> dict[Candidate, ProbeResult]:
    """The finished probes in ``folder``, in the order in which they were run; none where nothing was tuned yet.

    Raises:
        UserError: the file is damaged, or its probes belong to another run or were probed by other settings.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise UserError(f"{path} has format {content['format']}, this version reads format {_FORMAT}")
        results = [_from_json(item) for item in content["probes"]]
        there = content["identity"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): remove it, or choose another --output") from error
    # Both through JSON, where tuples are lists.
    changes = describe_differences(there, json.loads(json.dumps(identity)))
    if changes:
        raise UserError(
            f"{path} holds probes of another search: {changes}. Choose another --output, or restore those values"
        )
    return {result.candidate: result for result in results}


def write_results(folder: Path, identity: dict[str, Any], results: dict[Candidate, ProbeResult]) -> None:
    """Write all finished probes; a reader sees the old file or the new one."""
    content = {"format": _FORMAT, "identity": identity, "probes": [_to_json(result) for result in results.values()]}
    replace_text(folder / FILE_NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _to_json(result: ProbeResult) -> dict[str, Any]:
    verdict = result.verdict
    return {
        "start": result.candidate.start,
        "duration_steps": result.candidate.duration,
        "fluctuated_at": verdict.fluctuated_at,
        "worst_ratio": spell_non_finite(verdict.worst_ratio),
        "tokens": verdict.tokens,
        "validations": [[point.step, spell_non_finite(point.perplexity)] for point in result.points],
    }


def _from_json(item: dict[str, Any]) -> ProbeResult:
    return ProbeResult(
        candidate=Candidate(int(item["start"]), int(item["duration_steps"])),
        verdict=Verdict(
            fluctuated_at=item["fluctuated_at"], worst_ratio=float(item["worst_ratio"]), tokens=int(item["tokens"])
        ),
        points=tuple(Point(int(step), float(perplexity)) for step, perplexity in item["validations"]),
    )


_POLL_SECONDS = 0.5
_SHOWN_LINES = 15


class ProbeError(RuntimeError):
    """A probe ended with an error that is no fluctuation."""


@dataclass(frozen=True)
class Tuning:
    """A search in its directory."""

    tune_run: TuneRun
    grid: Grid
    folder: Path
    """Holds tune.json, the probes' run directories and the results."""

    runner: Runner

    def results(self) -> dict[Candidate, ProbeResult]:
        """Finished probes.

        Raises:
            UserError: they belong to another search.
        """
        return read_results(self.folder, self.tune_run.identity())

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
            write_results(self.folder, self.tune_run.identity(), self.results() | {candidate: result})
            yield result

    def _probe(self, candidate: Candidate, stop: StopRequest) -> ProbeResult | None:
        """Train a probe to its verdict; None if it was interrupted before."""
        probes = self.folder / "probes"
        probes.mkdir(exist_ok=True)
        config = self.tune_run.probe_config(candidate, output_dir=str(probes))
        output = probes / f"{probe_name(candidate)}.out"
        last = min(self.tune_run.settings.steps, self.tune_run.plan(candidate).steps)
        status = 0
        if not self._decided(config.run_dir, candidate, last=last):
            with closing(self.runner.start(config, output=output)) as job:
                asked = False
                while (polled := job.poll()) is None:
                    began = time.monotonic()
                    if not asked and (stop.requested or not self._result(config.run_dir, candidate).verdict.stable):
                        asked = job.ask_to_stop()
                    # Reading a long file again and again must not take the time of the ranks.
                    time.sleep(max(_POLL_SECONDS, 10 * (time.monotonic() - began)))
                status = polled
        if self._decided(config.run_dir, candidate, last=last):
            # A verdict is all that is wanted of a probe, and its checkpoints may be many times the size of the rest.
            shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)
            return self._result(config.run_dir, candidate)
        if stop.requested:
            return None
        raise _failure(candidate, status, output)

    def _decided(self, run_dir: Path, candidate: Candidate, *, last: int) -> bool:
        """Whether the probe's metrics hold a fluctuation or its last validation."""
        result = self._result(run_dir, candidate)
        return not result.verdict.stable or bool(result.points and result.points[-1].step >= last)

    def _result(self, run_dir: Path, candidate: Candidate) -> ProbeResult:
        train, valid = _columns(run_dir)
        steps, perplexities = valid["step"].astype(int).tolist(), valid["perplexity"].tolist()
        points = tuple(map(Point, steps, perplexities))
        # A step that fp16's loss scale left out did no harm.
        broken = ~np.isfinite(train["loss"]) & (train["skipped"] != 1)
        verdict = verdict_of(
            points,
            threshold=self.tune_run.settings.threshold,
            initial=float(self.tune_run.config.model.vocab_size),
            tokens=int(train["tokens"][-1]) if len(train["tokens"]) else 0,
            broken_steps=train["step"][broken].astype(int).tolist(),
        )
        return ProbeResult(candidate, verdict, points)


def _columns(run_dir: Path) -> tuple[dict[str, Column], dict[str, Column]]:
    """What is needed of a probe's train and eval records, of none where it has not begun."""
    train, valid = ("step", "tokens", "loss", "skipped"), ("step", "perplexity")
    if not (run_dir / METRICS_FILE).is_file():
        return {name: np.empty(0) for name in train}, {name: np.empty(0) for name in valid}
    return read_columns(run_dir, train), read_columns(run_dir, valid, kind="eval")


def _failure(candidate: Candidate, status: int, output: Path) -> Exception:
    with output.open(encoding="utf-8", errors="replace") as file:
        tail = "".join(deque(file, maxlen=_SHOWN_LINES))
    text = f"the probe of s = {candidate.start}, T = {candidate.duration:,} ended with status {status}; {output} says\n"
    return UserError(text + tail) if status == 2 else ProbeError(text + tail)
