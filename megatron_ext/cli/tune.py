"""``tune``: start length and duration of the length warmup, from short probes instead of whole runs."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import ConfigPath, Overrides, grouped, whole_numbers
from megatron_ext.errors import UserError
from megatron_ext.runtime.places import OUTPUT_DIR, check_place

if TYPE_CHECKING:
    from megatron_ext.experiments.tune import Tuning
    from megatron_ext.experiments.tune_jobs import Runner
    from megatron_ext.experiments.tune_search import Candidate, Grid
    from megatron_ext.experiments.tune_space import TuneRun

TUNED = "tuned.json"


@dataclass(frozen=True)
class TuneOptions:
    """What is searched, how it is probed, and where."""

    starts: Annotated[
        str | None,
        typer.Option(
            help="Start lengths to try, rising: 8,16,32.",
            show_default="8 to 128, or 64 to 256 from a billion parameters on",
        ),
    ] = None
    durations: Annotated[
        str | None,
        typer.Option(
            help="The T to choose among, in steps: 500,1000,2000.",
            show_default="units times powers of --notch, as far as the run goes",
        ),
    ] = None
    notch: Annotated[float, typer.Option(help="Ratio of one T to the one before.")] = 1.25
    unit: Annotated[
        int | None, typer.Option(min=1, help="Steps of a unit.", show_default="those of the learning rate's warmup")
    ] = None
    first: Annotated[int, typer.Option(min=1, help="T with which start lengths are compared, in units.")] = 3
    probe_units: Annotated[int, typer.Option(min=1, help="Length of a probe, in units.")] = 2
    probe_steps: Annotated[
        int | None, typer.Option(min=1, help="The same in steps.", show_default="--probe-units times the unit")
    ] = None
    beginning: Annotated[
        int | None,
        typer.Option(
            min=1, help="Up to this step a fluctuation asks for a longer start, not another T.", show_default="one unit"
        ),
    ] = None
    threshold: Annotated[
        float, typer.Option(help="Perplexity over the best so far that is a significant fluctuation.")
    ] = 1.3
    validate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between validations.", show_default="a tenth of a unit")
    ] = None
    validation_samples: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a validation.", show_default="the run's, at most 64")
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the search.", show_default="RUN_DIRECTORY_tune")
    ] = None
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a probe; by default one per GPU, or one on a CPU.")
    ] = None
    slurm: Annotated[
        str | None,
        typer.Option(
            help="Run probes as SLURM jobs with these options of sbatch: '--partition=gpu --gres=gpu:8'.",
            show_default="on this machine",
        ),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what could be run and what it costs at most.")] = (
        False
    )


@grouped
def command(config: ConfigPath, *, overrides: Overrides = None, options: TuneOptions) -> None:
    """Find the curriculum's start length s and duration T at a small part of a run's cost, as the paper does.

    Raises s until validation perplexity no longer fluctuates at the very beginning of training, then finds the largest
    T without a fluctuation by binary search. Interrupt it and call it again: it goes on. Writes tuned.json (the
    config, extended by the curriculum) and report.md.

    Example: megatron-ext tune configs/gpt2/1.5b_slw.json --starts 64,96,128 --nproc 8
    """
    from megatron_ext.config.loading import parse_layers, parse_overrides, read_layers
    from megatron_ext.config.merging import ConfigLayer
    from megatron_ext.experiments import tune_space
    from megatron_ext.experiments.tune import Tuning
    from megatron_ext.model.counts import count_parameters

    if not options.threshold > 1 or not options.notch > 1:
        raise UserError(f"--threshold is {options.threshold:g} and --notch is {options.notch:g}: write numbers above 1")
    changes = parse_overrides(overrides or ())
    layers = (*read_layers(config), ConfigLayer("--set", changes))
    run = parse_layers(layers)
    parameters = count_parameters(run.model, positions=run.max_positions).total
    usual = {"seq_len": run.training.seq_len, "parameters": parameters}
    lengths = (
        whole_numbers("--starts", options.starts)
        if options.starts
        else tune_space.default_starts(run.curriculum, **usual)
    )
    steps = options.unit or tune_space.unit_of(
        run.learning_rate.warmup, start=lengths[0], batch_size=run.training.batch_size
    )
    settings = tune_space.ProbeSettings(
        threshold=options.threshold,
        steps=options.probe_steps or options.probe_units * steps,
        validate_every=options.validate_every or max(1, steps // 10),
        validation_samples=options.validation_samples or min(64, run.validation.samples),
    )
    tune_run = tune_space.TuneRun(layers, run, settings)
    given = whole_numbers("--durations", options.durations) if options.durations else None
    spacing = tune_space.DurationSpacing(unit=steps, ratio=options.notch, first=options.first, given=given)
    grid = tune_space.grid_of(tune_run, lengths, spacing, beginning=options.beginning or steps)
    folder = options.output or run.run_dir.with_name(run.name + "_tune")
    check_place(folder, remedy="set --output" if options.output else OUTPUT_DIR)
    if options.dry_run:
        _announce(tune_run, grid)
        return
    tuning = Tuning(tune_run, grid, folder=folder, runner=_runner(options.nproc, options.slurm))
    _tune(tuning, config, changes)


def _announce(tune_run: "TuneRun", grid: "Grid") -> None:
    from megatron_ext.experiments.tune_search import Candidate, paths

    candidates = [Candidate(start, steps) for start, durations in grid.durations.items() for steps in durations]
    whole = {candidate: tune_run.probe_tokens(candidate) for candidate in candidates}
    early = {candidate: tune_run.probe_tokens(candidate, steps=grid.beginning) for candidate in candidates}
    foreseen = list(paths(grid))
    costs = [
        sum((early if verdict.fluctuated_at == grid.beginning else whole)[probe] for probe, verdict in path.items())
        for path in foreseen
    ]
    possible = {candidate for path in foreseen for candidate in path}
    typer.echo(f"Probes of {tune_run.settings.steps:,} steps that could be run (not all of them will be):")
    for start, durations in grid.durations.items():
        listed = [f"{steps:,}" for steps in durations if Candidate(start, steps) in possible]
        typer.echo(f"  s = {start:4d}, T = {', '.join(listed)}")
    full = min(tune_run.plan(Candidate(start, grid.first)).tokens for start in grid.durations)
    typer.echo(
        f"At most {max(map(len, foreseen))} probes and {max(costs):,} tokens, {max(costs) / full:.1%} of the run's "
        f"{full:,}; all {len(whole)} pairs of s and T would be {sum(whole.values()):,} tokens."
    )


def _runner(nproc: int | None, slurm: str | None) -> "Runner":
    from megatron_ext.experiments.tune_jobs import LocalRunner, SlurmRunner
    from megatron_ext.launch.launcher import this_machine

    if slurm is None:
        return LocalRunner(this_machine(nproc))
    try:
        return SlurmRunner(tuple(shlex.split(slurm)), ranks=nproc)
    except ValueError as error:
        raise UserError(f"--slurm is {slurm!r} ({error}): write sbatch's options as in a shell") from None


def _tune(tuning: "Tuning", config: Path, changes: dict[str, object]) -> None:
    from megatron_ext.experiments.tune_report import verdict_text
    from megatron_ext.experiments.tune_search import Candidate
    from megatron_ext.runtime.signals import stop_on_signal

    for result in tuning.results().values():
        typer.echo(f"s = {result.candidate.start}, T = {result.candidate.duration:,}: {verdict_text(result)} (before)")
    with stop_on_signal() as stop:
        for event in tuning.run(stop):
            if isinstance(event, Candidate):
                typer.echo(f"s = {event.start}, T = {event.duration:,}: ", nl=False)
            else:
                typer.echo(f"{verdict_text(event)}, {event.verdict.tokens:,} tokens")
    if isinstance(tuning.next(), Candidate):
        typer.echo(f"stopped on {stop.signal_name}; the same command goes on from here")
        raise typer.Exit(130)
    _conclude(tuning, config, changes)


def _conclude(tuning: "Tuning", config: Path, changes: dict[str, object]) -> None:
    from megatron_ext.experiments.tune_report import Findings, write_report
    from megatron_ext.experiments.tune_search import Outcome

    outcome, tune_run = tuning.next(), tuning.tune_run
    assert isinstance(outcome, Outcome), "called at the end of the search"
    best = outcome.best
    findings = Findings(
        results=list(tuning.results().values()),
        settings=tune_run.settings,
        vocab_size=tune_run.config.model.vocab_size,
        best=best,
        notes=outcome.notes,
        full_tokens=tune_run.plan(best).tokens if best else None,
    )
    page = write_report(tuning.folder, findings)
    for note in outcome.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{findings.cost()}\nreport: {page}")
    if best is None:
        raise UserError(
            f"no curriculum without fluctuations was found ({'; '.join(outcome.notes)}): lower learning_rate.peak, "
            "lengthen its warmup, or offer other --starts or --durations"
        )
    typer.echo(f"tuned: s = {best.start}, T = {best.duration:,} in {_write_tuned(tuning, best, config, changes)}")


def _write_tuned(tuning: "Tuning", best: "Candidate", config: Path, changes: dict[str, object]) -> Path:
    """Write the config that extends the given one and its overrides by the curriculum that was found."""
    from megatron_ext.config.loading import load_config

    path = tuning.folder / TUNED
    tree = {"extends": os.path.relpath(config.resolve(), path.parent.resolve()), **changes}
    tree["curriculum"] = tuning.tune_run.curriculum(best)
    path.write_text(json.dumps(tree, indent=2) + "\n")
    written, meant = load_config(path), tuning.tune_run.tuned(best)
    assert written == meant, "the file says what was tuned"
    return path
