"""``experiment run``: the runs of an experiment on this machine, or as an array of SLURM jobs."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import ExperimentPath
from megatron_ext.cli.experiment_tables import console, plan_table, status_table
from megatron_ext.cli.slurm_options import (
    Account,
    ContainerImage,
    ContainerRuntime,
    CpusPerTask,
    GpusPerNode,
    Interpreter,
    Mounts,
    Nodes,
    Partition,
    Sbatch,
    SignalSeconds,
    TasksPerNode,
    Time,
    check_runs,
    container_of,
    resources_of,
)
from megatron_ext.experiments.config import Experiment, load_experiment
from megatron_ext.launch.slurm import FOLDER, absolute, submit, submit_job, training_job
from megatron_ext.runtime.places import check_place

if TYPE_CHECKING:
    from megatron_ext.cli.experiment_runs import RunStatus
    from megatron_ext.launch.job_script import TrainingJob

ATTEMPTS = 2
"""Of a run: one that failed is tried once more, from its newest checkpoint."""


def command(
    file: ExperimentPath,
    *,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Ranks on this machine; by default the file's, or one per GPU, or one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained.")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit the runs as one array; the options below are for its jobs.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most runs of the array at a time.")] = None,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    tasks_per_node: TasksPerNode = None,
    cpus_per_task: CpusPerTask = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    signal_seconds: SignalSeconds = None,
    sbatch: Sbatch = None,
    container: ContainerImage = None,
    container_runtime: ContainerRuntime = "pyxis",
    mounts: Mounts = None,
    python: Interpreter = None,
) -> None:
    """Train the runs of an experiment: one after the other here, or with --slurm as an array of jobs.

    Finished runs are skipped, interrupted ones go on. One that fails is tried once more from its newest checkpoint and
    then marked, and the others are still trained; then the exit status is 1. SIGINT (Ctrl-C) and SIGTERM save the
    present run and begin no other. With --slurm the command returns at once, runs that have a job are left to it, and a
    last job writes the report.

    Example: megatron-ext experiment run configs/experiments/comparators.json --dry-run
    """
    experiment = load_experiment(file)
    for item in experiment.runs:
        check_place(item.config.run_dir)
    if not slurm:
        _run_here(experiment, nproc=nproc, dry_run=dry_run)
        return
    resources = resources_of(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        partition=partition,
        account=account,
        time=time,
        signal_seconds=signal_seconds,
        extra=sbatch,
    )
    configs = [item.config for item in experiment.runs]
    image = container_of(container, container_runtime, mounts, configs)
    job = training_job(configs, resources, container=image, python=python)
    _submit(experiment, replace(job, at_once=limit, attempts=ATTEMPTS), dry_run=dry_run)


def _run_here(experiment: Experiment, *, nproc: int | None, dry_run: bool) -> None:
    from megatron_ext.cli.experiment_runs import data_of, done, statuses, train_all

    if dry_run:
        _announce(experiment)
        return
    finished = train_all(experiment, nproc=nproc)
    found = statuses(experiment)
    console().print(status_table(found))
    typer.echo(done(found))
    if finished:
        from megatron_ext.analysis.report import write_report

        page = Path(experiment.config.output_dir) / "report.html"
        write_report(data_of(experiment), page, title=experiment.config.name, target_loss=None)
        typer.echo(f"report: {page}")
    failed = any(status.state == "failed" for status in found)
    if failed or not finished:
        raise typer.Exit(1 if failed else 0)


def _announce(experiment: Experiment) -> None:
    from megatron_ext.cli.experiment_runs import plans_of, statuses

    plans = plans_of(experiment)
    console().print(plan_table(statuses(experiment)))
    totals = sum(plan.tokens for plan in plans)
    typer.echo(f"{len(plans)} runs, {sum(plan.steps for plan in plans):,} steps, {totals:,} tokens")


def _submit(experiment: Experiment, job: "TrainingJob", *, dry_run: bool) -> None:
    """Submit what is not finished and has no job yet, and a job that reports when all of it is over."""
    from megatron_ext.cli.experiment_runs import Ledger, statuses

    left = [item for item in statuses(experiment) if item.state not in {"finished", "queued", "running"}]
    if not left:
        typer.echo("every run is finished or has a job in the queue")
        return
    configs = [item.run.config for item in left]
    output = absolute(Path(experiment.config.output_dir)) / FOLDER
    job = replace(
        job,
        name=experiment.config.name,
        run_dirs=tuple(absolute(config.run_dir) for config in configs),
        task_ids=tuple(range(len(left))),
        output=output,
    )
    check_runs(configs, job.resources, dry_run=dry_run)
    if dry_run:
        _announce(experiment)
        typer.echo(job.script(), nl=False)
        return
    ledger = Ledger(experiment)
    number = submit_job(job, configs)
    for item in left:
        ledger.forget(item.run)
    _tell(left, number)
    reporter = _submit_report(experiment, job, after=number)
    typer.echo(f"job {reporter} then writes the report; `megatron-ext experiment status {experiment.source} --watch`")


def _tell(left: "list[RunStatus]", number: str) -> None:
    typer.echo(f"submitted array {number}: {len(left)} runs")
    for task, item in enumerate(left):
        typer.echo(f"  {number}_{task}  {item.name}")


def _submit_report(experiment: Experiment, job: "TrainingJob", *, after: str) -> str:
    arguments = ("experiment", "report", str(absolute(experiment.source)))
    script = job.command_script(arguments, name=f"{experiment.config.name}-report", dependency=f"afterany:{after}")
    return submit(script, remedy="The array is submitted; call `megatron-ext experiment report` yourself")
