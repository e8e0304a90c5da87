"""The runs of an experiment: what state each is in, and how they are trained on this machine, one after the other.

Everything is read off the run directories, so that a status is right whoever trained a run. Beside them stand
``experiment-NAME.json``, which remembers how a run ended that has no other trace of it, ``experiment-NAME.lock``, which
keeps two processes from training the same experiment, and ``configs/RUN.json``, what each run was started with.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_ext.config.resolved import resolved_json
from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.errors import UserError
from megatron_ext.experiments.config import Experiment, ExperimentRun
from megatron_ext.launch.slurm import QueuedJob
from megatron_ext.launch.status import Progress, Situation, State, read_progress, situations
from megatron_ext.runtime.files import replace_text
from megatron_ext.runtime.run_lock import HeldError, file_lock, is_held
from megatron_ext.text import finite_or_none

if TYPE_CHECKING:
    from megatron_ext.analysis.run_data import RunData

Say = Callable[..., None]
"""``say(line)``, ``say(line, err=True)`` about what failed; as typer.echo."""

ATTEMPTS = 2
"""Of a run: one that failed is tried once more, from its newest checkpoint."""

_BAD_INPUT = 2
"""Exit status of a run whose input is wrong: another attempt would find it as wrong."""


@dataclass(frozen=True)
class RunStatus:
    """Where a run is."""

    run: ExperimentRun
    state: State
    progress: Progress
    note: str = ""
    """Why it failed."""

    queued: QueuedJob | None = None
    """Its job, where one waits or runs."""

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return self.run.config.name

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values; a ratio that is not finite is null."""
        progress, job = self.progress, self.queued
        return {
            "run": self.name,
            "run_dir": str(self.run.config.run_dir),
            "variant": self.run.variant,
            "seed": self.run.seed,
            "state": self.state,
            "step": progress.step,
            "steps": progress.steps,
            "tokens": progress.tokens,
            "valid_loss": finite_or_none(progress.valid_loss),
            "largest_ratio": finite_or_none(progress.largest_ratio),
            "seconds": progress.seconds,
            "eta_s": progress.eta_seconds,
            "job": job.job if job else None,
            "job_state": job.state if job else None,
            "note": self.note,
        }


def plans_of(experiment: Experiment) -> list[TrainingPlan]:
    """The plan of every run, in order.

    Raises:
        UserError: durations of a variant contradict each other; it names the variant.
    """
    plans = []
    for run in experiment.runs:
        try:
            plans.append(run.config.plan())
        except UserError as error:
            raise UserError(f"{experiment.source} (variant {run.variant}): {error}") from None
    return plans


def statuses(experiment: Experiment) -> list[RunStatus]:
    """The state of every run, in order.

    Raises:
        UserError: a plan contradicts itself, or a file in a run's directory cannot be read.
    """
    ledger = Ledger(experiment)
    running = ledger.running()
    found = [read_progress(run.config, plan) for run, plan in zip(experiment.runs, plans_of(experiment), strict=True)]
    places = [(run.config.run_dir, progress) for run, progress in zip(experiment.runs, found, strict=True)]
    return [
        _status(run, progress, situation, entry=ledger.entry(run), running=running == run.config.name)
        for run, progress, situation in zip(experiment.runs, found, situations(places), strict=True)
    ]


def _status(
    run: ExperimentRun, progress: Progress, situation: Situation, *, entry: dict[str, Any], running: bool
) -> RunStatus:
    state, note = situation.state, situation.note
    if running:
        # From the moment on in which its ranks are being started.
        state = "running"
    elif entry.get("exit_status") and state in {"waiting", "interrupted"}:
        state, note = "failed", str(entry.get("note", ""))
    return RunStatus(run=run, state=state, progress=progress, note=note, queued=situation.queued)


def train_all(experiment: Experiment, *, nproc: int | None = None, say: Say) -> bool:
    """Train every run that is not finished, one after the other; whether all of them are finished then.

    A run that fails is tried once more, from its newest checkpoint; then it is marked and the next one begins. Those
    that have a job in the queue are left to it. SIGINT and SIGTERM end the present run with a checkpoint, and no other
    begins. ``say`` is called with each line for people.

    Raises:
        UserError: a run's directory holds another run, or another process is training this experiment. Nothing has been
            started then.
    """
    from megatron_ext.runtime.signals import stop_on_signal

    ledger = Ledger(experiment)
    before = statuses(experiment)
    _refuse_other_runs(experiment)
    with ledger.lock(), stop_on_signal() as stop:
        for number, status in enumerate(before, start=1):
            if stop.requested:
                say(f"stopped on {stop.signal_name}; the same command goes on from here")
                break
            head = f"[{number}/{len(before)}] {status.name}"
            if status.state == "finished":
                say(f"{head}: finished before, skipped")
                continue
            if status.queued is not None:
                say(f"{head}: job {status.queued.job} is {status.queued.state}, skipped")
                continue
            step = status.progress.step
            say(f"{head}: {f'from step {step:,}' if step else 'new'}")
            ledger.note(status.run, began=True)
            ranks = nproc or experiment.config.nproc
            exit_status, note = _train(status.run, ledger, nproc=ranks, stop=stop, say=say)
            ledger.note(status.run, exit_status=exit_status, note=note)
    after = statuses(experiment)
    for status in after:
        if status.state == "failed":
            say(f"{status.name} failed: {status.note}", err=True)
    return all(status.state == "finished" for status in after)


def _train(run: ExperimentRun, ledger: "Ledger", *, nproc: int | None, stop: Any, say: Say) -> tuple[int, str]:
    """Exit status of the run, of its second attempt where the first failed, and what to say of it if that is not 0."""
    from megatron_ext.launch.launcher import launch, this_machine

    exit_status, note = 0, ""
    for attempt in range(ATTEMPTS):
        if attempt:
            say(f"{run.config.name} failed ({note}); once more from its newest checkpoint", err=True)
        try:
            ledger.write_config(run)
            exit_status = launch(this_machine(nproc), run.config, stop=stop)
        except UserError as error:
            say(f"error: {error}", err=True)
            return _BAD_INPUT, str(error)
        if exit_status == 0:
            return 0, ""
        note = f"exit status {exit_status}; the reason is above, or in {run.config.run_dir / 'log.txt'}"
        if exit_status == _BAD_INPUT or stop.requested:
            break
    return exit_status, note


def data_of(experiment: Experiment) -> "list[RunData]":
    """Metrics of the runs that have trained a step, in order; the seeds of a variant are a group.

    Raises:
        UserError: none has.
    """
    from megatron_ext.analysis.run_data import read_run
    from megatron_ext.metrics.reading import read_columns
    from megatron_ext.metrics.records import FILE_NAME

    found = []
    for run in experiment.runs:
        # A run that has just begun has a file without steps.
        file = run.config.run_dir / FILE_NAME
        if file.is_file() and len(read_columns(file, ["step"])["step"]):
            found.append(read_run(file, label=run.config.name, group=run.variant))
    if not found:
        raise UserError(
            f"{experiment.source}: no run of it has trained a step yet; `megatron-ext experiment run` trains them"
        )
    return found


def _refuse_other_runs(experiment: Experiment) -> None:
    """Raise UserError where a run's directory holds a run of another config."""
    from megatron_ext.checkpoint.store import newest_checkpoint
    from megatron_ext.checkpoint.verify import check_resumable, read_manifest

    for run in experiment.runs:
        newest = newest_checkpoint(run.config.run_dir / "checkpoints")
        if newest is not None:
            manifest = read_manifest(newest)
            determining = run.config.determining_values()
            check_resumable(manifest, determining=determining, layout=manifest.layout, where=newest)


class Ledger:
    """The files beside the run directories."""

    def __init__(self, experiment: Experiment) -> None:
        self._folder = Path(experiment.config.output_dir)
        self._path = self._folder / f"experiment-{experiment.config.name}.json"
        self._lock = self._path.with_suffix(".lock")

    def entry(self, run: ExperimentRun) -> dict[str, Any]:
        """What is remembered of a run."""
        found = self._read().get(run.config.name, {})
        return found if isinstance(found, dict) else {}

    def note(self, run: ExperimentRun, **entry: Any) -> None:
        """Remember that the run began, or how it ended."""
        self._write(self._read() | {run.config.name: entry})

    def forget(self, run: ExperimentRun) -> None:
        """Remember nothing of how the run ended: from here on its job says so."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write({name: entry for name, entry in self._read().items() if name != run.config.name})

    def running(self) -> str | None:
        """Name of the run that a process is training now."""
        if not is_held(self._lock):
            return None
        return next((name for name, entry in self._read().items() if "began" in entry), None)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the experiment for this process.

        Raises:
            UserError: another process holds it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with file_lock(self._lock):
                yield
        except HeldError as holder:
            raise UserError(
                f"{self._folder}: another process is training this experiment ({holder}); wait for it, or stop it first"
            ) from None

    def write_config(self, run: ExperimentRun) -> None:
        """Write down what the run is started with."""
        path = self._folder / "configs" / f"{run.config.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, resolved_json(run.config))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} cannot be read ({error}); remove it") from None
        return content if isinstance(content, dict) else {}

    def _write(self, entries: dict[str, Any]) -> None:
        replace_text(self._path, json.dumps(entries, indent=1) + "\n")


def done(found: Sequence[RunStatus]) -> str:
    """How many runs are in which state, in words."""
    counts = {state: sum(status.state == state for status in found) for state in get_args(State)}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
