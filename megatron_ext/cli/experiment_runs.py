"""The runs of an experiment on this machine: what state each is in, and how they are trained one after the other.

Everything is read off the run directories, so that a status is right whoever trained a run. Beside them stand
``experiment-NAME.json``, which remembers how a run ended that has no other trace of it, ``experiment-NAME.lock``, which
keeps two processes from training the same experiment, and ``configs/RUN.json``, what each run was started with.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from megatron_ext.config.experiment import Experiment, ExperimentRun
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.metrics.jsonl import Metrics
    from megatron_ext.metrics.report_data import RunData

State = Literal["waiting", "running", "interrupted", "failed", "finished"]


@dataclass(frozen=True)
class RunStatus:
    """Where a run is."""

    run: ExperimentRun
    state: State
    step: int
    """Finished steps, of those that metrics.jsonl holds."""

    steps: int
    """Steps of the plan."""

    tokens: int
    """Tokens consumed."""

    valid_loss: float | None
    """The last validation loss (nats per token)."""

    largest_ratio: float | None
    """The largest loss ratio; infinite after a loss that was not finite."""

    seconds: float
    """Time spent in steps."""

    note: str = ""
    """Why it failed."""

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return self.run.config.name

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values; a ratio that is not finite is null."""
        ratio = self.largest_ratio
        return {
            "run": self.name,
            "run_dir": str(self.run.config.run_dir),
            "variant": self.run.variant,
            "seed": self.run.seed,
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "tokens": self.tokens,
            "valid_loss": _finite(self.valid_loss),
            "largest_ratio": _finite(ratio),
            "seconds": self.seconds,
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
            plans.append(TrainingPlan.from_config(run.config))
        except UserError as error:
            raise UserError(f"{experiment.source} (variant {run.variant}): {error}") from None
    return plans


def statuses(experiment: Experiment) -> list[RunStatus]:
    """The state of every run, in order.

    Raises:
        UserError: a plan contradicts itself, or a file in a run's directory cannot be read.
    """
    ledger = _Ledger(experiment)
    running = ledger.running()
    return [
        _status(run, plan, entry=ledger.entry(run), running=running == run.config.name)
        for run, plan in zip(experiment.runs, plans_of(experiment), strict=True)
    ]


def train_all(experiment: Experiment, *, nproc: int | None = None) -> bool:
    """Train every run that is not finished, one after the other; whether all of them are finished then.

    A run that fails is told and the next one begins. SIGINT and SIGTERM end the present run with a checkpoint, and
    no other begins.

    Raises:
        UserError: a run's directory holds another run, or another process is training this experiment. Nothing has been
            started then.
    """
    from megatron_ext.runtime.signals import stop_on_signal

    ledger = _Ledger(experiment)
    before = statuses(experiment)
    _refuse_other_runs(experiment)
    with ledger.lock(), stop_on_signal() as stop:
        for number, status in enumerate(before, start=1):
            if stop.requested:
                typer.echo(f"stopped on {stop.signal_name}; the same command goes on from here")
                break
            head = f"[{number}/{len(before)}] {status.name}"
            if status.state == "finished":
                typer.echo(f"{head}: finished before, skipped")
                continue
            typer.echo(f"{head}: {'from step ' + format(status.step, ',') if status.step else 'new'}")
            ledger.begin(status.run)
            exit_status, note = _train(status.run, ledger, nproc=nproc or experiment.config.nproc, stop=stop)
            ledger.end(status.run, exit_status, note=note)
    after = statuses(experiment)
    for status in after:
        if status.state == "failed":
            typer.echo(f"{status.name} failed: {status.note}", err=True)
    return all(status.state == "finished" for status in after)


def _train(run: ExperimentRun, ledger: "_Ledger", *, nproc: int | None, stop: Any) -> tuple[int, str]:
    """Exit status of the run, and what to say of it if that is not 0."""
    from megatron_ext.cli.train import start

    try:
        exit_status = start(ledger.write_config(run), nproc=nproc, stop=stop)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        return 2, str(error)
    if exit_status == 0:
        return 0, ""
    return exit_status, f"exit status {exit_status}; the reason is above, or in {run.config.run_dir / 'log.txt'}"


def _status(run: ExperimentRun, plan: TrainingPlan, *, entry: dict[str, Any], running: bool) -> RunStatus:
    from megatron_ext.metrics.jsonl import FILE_NAME, read_metrics

    metrics = read_metrics(run.config.run_dir) if (run.config.run_dir / FILE_NAME).is_file() else None
    last = metrics.train[-1] if metrics and metrics.train else None
    evaluation = metrics.evaluations[-1] if metrics and metrics.evaluations else None
    return RunStatus(
        run=run,
        state=_state(run, metrics, entry=entry, running=running),
        step=last.step if last else 0,
        steps=plan.steps,
        tokens=last.tokens if last else 0,
        valid_loss=evaluation.loss if evaluation else None,
        largest_ratio=max(record.loss_ratio for record in metrics.train) if metrics and last else None,
        seconds=sum(record.step_time_s for record in metrics.train) if metrics else 0.0,
        note=str(entry.get("note", "")),
    )


def _state(run: ExperimentRun, metrics: "Metrics | None", *, entry: dict[str, Any], running: bool) -> State:
    if running:
        return "running"
    if _is_finished(run.config, metrics):
        return "finished"
    if entry.get("exit_status"):
        return "failed"
    return "interrupted" if metrics is not None and metrics.train else "waiting"


def _is_finished(config: RunConfig, metrics: "Metrics | None") -> bool:
    """Whether a checkpoint or a validation stands at the end of the run, or where ``training.stop_after`` ends it."""
    from megatron_ext.checkpoint.manifest import read_manifest
    from megatron_ext.checkpoint.store import newest_checkpoint

    reached: list[tuple[int, int]] = []
    newest = newest_checkpoint(config.run_dir / "checkpoints")
    if newest is not None:
        manifest = read_manifest(newest)
        reached.append((manifest.step, manifest.tokens))
    if metrics and metrics.evaluations:
        reached.append((metrics.evaluations[-1].step, metrics.evaluations[-1].tokens))
    ends = [end for end in (config.training.duration, config.training.stop_after) if end is not None]
    # Compared with the duration, not with the plan's steps: those of adaptive pacing become known on the way.
    return any(
        step >= end.steps if end.steps is not None else tokens >= (end.tokens or 0)
        for step, tokens in reached
        for end in ends
    )


def data_of(experiment: Experiment) -> "list[RunData]":
    """Metrics of the runs that have trained a step, in order; the seeds of a variant are a group.

    Raises:
        UserError: none has.
    """
    from megatron_ext.metrics.columns import read_columns
    from megatron_ext.metrics.jsonl import FILE_NAME
    from megatron_ext.metrics.report_data import read_run

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
    from megatron_ext.checkpoint.manifest import check_resumable, read_manifest
    from megatron_ext.checkpoint.store import newest_checkpoint

    for run in experiment.runs:
        newest = newest_checkpoint(run.config.run_dir / "checkpoints")
        if newest is not None:
            manifest = read_manifest(newest)
            check_resumable(manifest, run.config, layout=manifest.layout, where=newest)


class _Ledger:
    """The files beside the run directories."""

    def __init__(self, experiment: Experiment) -> None:
        self._folder = Path(experiment.config.output_dir)
        self._path = self._folder / f"experiment-{experiment.config.name}.json"
        self._lock = self._path.with_suffix(".lock")

    def entry(self, run: ExperimentRun) -> dict[str, Any]:
        """What is remembered of a run."""
        found = self._read().get(run.config.name, {})
        return found if isinstance(found, dict) else {}

    def begin(self, run: ExperimentRun) -> None:
        """Remember that the run is being trained."""
        self._write(self._read() | {run.config.name: {"began": True}})

    def end(self, run: ExperimentRun, exit_status: int, *, note: str) -> None:
        """Remember how the run ended."""
        self._write(self._read() | {run.config.name: {"exit_status": exit_status, "note": note}})

    def running(self) -> str | None:
        """Name of the run that a process is training now."""
        try:
            with self._lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return next((name for name, entry in self._read().items() if "began" in entry), None)
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the experiment for this process.

        Raises:
            UserError: another process holds it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self._folder}: another process is training this experiment; wait for it, or stop it first"
                ) from None
            yield

    def write_config(self, run: ExperimentRun) -> Path:
        """Write the run's resolved config and return its path."""
        path = self._folder / "configs" / f"{run.config.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run.config.model_dump(mode="json"), indent=1) + "\n")
        return path

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} cannot be read ({error}); remove it") from None
        return content if isinstance(content, dict) else {}

    def _write(self, entries: dict[str, Any]) -> None:
        aside = self._path.with_suffix(".partial")
        aside.write_text(json.dumps(entries, indent=1) + "\n")
        aside.replace(self._path)


def _finite(value: float | None) -> float | None:
    import math

    return value if value is not None and math.isfinite(value) else None


def done(found: Sequence[RunStatus]) -> str:
    """How many runs are in which state, in words."""
    counts = {state: sum(status.state == state for status in found) for state in State.__args__}  # type: ignore[attr-defined]
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
