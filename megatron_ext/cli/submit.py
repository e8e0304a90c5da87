"""``submit``: one run, or an array of them, as a SLURM job."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import ConfigPath, Overrides, grouped
from megatron_ext.cli.slurm_options import SlurmOptions, check_runs
from megatron_ext.errors import UserError
from megatron_ext.launch.job_script import word
from megatron_ext.launch.slurm import absolute, submit_job

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig
    from megatron_ext.launch.job_script import TrainingJob

TASK = "{task}"

Array = Annotated[
    str | None,
    typer.Option(
        "--array",
        metavar="TASKS",
        help=f"Several runs as an array, e.g. 1-8%4: {TASK} in --set is the task's number, as in --set seed={TASK}.",
    ),
]


@grouped
def command(
    config: ConfigPath,
    *,
    overrides: Overrides = None,
    slurm: SlurmOptions,
    array: Array = None,
    dependency: Annotated[
        str | None, typer.Option("--dependency", help="What the job waits for, as sbatch writes it: afterok:123.")
    ] = None,
    chain: Annotated[
        int,
        typer.Option(
            min=1, help="Jobs one after the other, for a run longer than the time limit, instead of requeueing."
        ),
    ] = 1,
    retries: Annotated[
        int, typer.Option(min=0, help="Further attempts of a run that fails, from its newest checkpoint.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script; write and submit nothing.")
    ] = False,
) -> None:
    """Train a model as a SLURM job; call it where the nodes see the same directories, and paths mean the same.

    Everything that can be wrong with config and data is found here. Before its time limit, and when it is preempted,
    the run saves a checkpoint, and the job asks for another turn, in which the run goes on; so it does after the
    failure of a node. What the job prints is in RUN/slurm; `megatron-ext status RUN` says how far it is.

    Example: megatron-ext submit configs/gpt2/1.5b_slw.json --nodes 8 --gpus-per-node 8 --time 24:00:00 --dry-run
    """
    tasks, at_once = _tasks(array, chain=chain)
    configs = load_runs(config, overrides or (), tasks)
    job = replace(
        slurm.job(configs),
        task_ids=tasks,
        at_once=at_once,
        dependency=dependency,
        attempts=retries + 1,
        requeue=chain == 1,
    )
    check_runs(configs, job.resources, dry_run=dry_run)
    if dry_run:
        typer.echo(job.script(), nl=False)
    else:
        _submit(job, configs, chain=chain)


def _tasks(array: str | None, *, chain: int) -> tuple[tuple[int, ...], int | None]:
    """Numbers of the array's tasks, none without an array, and how many run at a time."""
    from megatron_ext.launch.job_script import parse_array

    if array is None:
        return (), None
    if chain > 1:
        raise UserError("--array and --chain: the jobs of a chain wait for the whole one before; use one of the two")
    return parse_array(array)


def load_runs(path: Path, overrides: list[str] | tuple[str, ...], tasks: tuple[int, ...]) -> "list[RunConfig]":
    """The run of each task, or the one run.

    Raises:
        UserError: a config is wrong, or two tasks would train in one directory.
    """
    from megatron_ext.config.loading import load_config

    if not tasks:
        return [load_config(path, overrides)]
    configs = [load_config(path, [text.replace(TASK, str(task)) for text in overrides]) for task in tasks]
    if len({absolute(config.run_dir) for config in configs}) < len(configs):
        raise UserError(
            f"--array: the tasks would train in one directory, {configs[0].run_dir}; add for example "
            f"--set name={configs[0].name}-{TASK} --set seed={TASK}"
        )
    return configs


def _submit(job: "TrainingJob", configs: "list[RunConfig]", *, chain: int) -> None:
    numbers = [submit_job(job, configs)]
    for _ in range(1, chain):
        # After every one before, so that the first that ends the run takes all of the others out of the queue.
        options = [f"--dependency=afternotok:{':'.join(numbers)}", "--kill-on-invalid-dep=yes"]
        try:
            numbers.append(submit_job(replace(job, dependency=None), configs, options=options, follows=True))
        except UserError as error:
            raise UserError(
                f"of the chain, {len(numbers)} job(s) ({', '.join(numbers)}) are submitted: {error}"
            ) from None
    kind = "array" if job.task_ids else "chain of jobs" if chain > 1 else "job"
    typer.echo(f"submitted {kind} {' '.join(numbers)}; to end it: scancel {' '.join(numbers)}")
    for config in configs:
        typer.echo(f"megatron-ext status {word(str(config.run_dir))}")
