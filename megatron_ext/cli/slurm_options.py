"""The options that say what a SLURM job occupies, and the jobs made of them: for ``submit`` and ``experiment run``."""

import json
import os.path
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig
    from megatron_ext.slurm.job import Container, Resources, TrainingJob

Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Nodes of a job.")]
GpusPerNode = Annotated[
    int | None,
    typer.Option("--gpus-per-node", min=1, help="GPUs of each node, one rank on each.", show_default="none: CPUs"),
]
TasksPerNode = Annotated[
    int | None,
    typer.Option("--tasks-per-node", min=1, help="Ranks of each node.", show_default="one per GPU, or one"),
]
CpusPerTask = Annotated[int | None, typer.Option("--cpus-per-task", min=1, help="CPU cores of each rank.")]
Partition = Annotated[str | None, typer.Option("--partition", help="Partition to submit to.")]
Time = Annotated[
    str | None,
    typer.Option("--time", metavar="LIMIT", help="Time limit: MINUTES, HH:MM:SS or D-HH:MM:SS."),
]
Account = Annotated[str | None, typer.Option("--account", help="Account to charge.")]
SignalSeconds = Annotated[
    int | None,
    typer.Option(
        "--signal-seconds",
        help="Stop, save and requeue this long before the limit; more than a step and a checkpoint take.",
        show_default="300, of a short limit a tenth",
    ),
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="KEY=VALUE", help="Another option of sbatch, e.g. qos=high; may be repeated."),
]
ContainerImage = Annotated[
    str | None, typer.Option("--container", metavar="IMAGE", help="Image in which the ranks run.")
]
ContainerRuntime = Annotated[
    str, typer.Option("--container-runtime", help="pyxis (srun --container-image) or apptainer.")
]
Mounts = Annotated[
    list[str] | None,
    typer.Option(
        "--mount",
        metavar="PATH",
        help="Path that the container sees as well; may be repeated.",
        show_default="the working and output directories, and those of the data",
    ),
]
Interpreter = Annotated[
    str | None,
    typer.Option("--python", help="Python of the ranks.", show_default="this one; in a container python3"),
]


def resources_of(**given: Any) -> "Resources":
    """What a job occupies, from the options of a command by their names in Resources."""
    from megatron_ext.slurm.job import Resources

    extra = tuple(given.pop("extra") or ())
    tasks = given.pop("tasks_per_node") or given["gpus_per_node"] or 1
    return Resources(**given, tasks_per_node=tasks, extra=extra)


def container_of(
    image: str | None, runtime: str, mounts: Sequence[str] | None, configs: Sequence["RunConfig"]
) -> "Container | None":
    """The container, from the options of a command; by default it sees what ``configs`` name.

    Raises:
        UserError: an unknown runtime.
    """
    from megatron_ext.slurm.job import Container

    if runtime not in {"pyxis", "apptainer"}:
        raise UserError(f"--container-runtime is {runtime!r}: write pyxis or apptainer")
    if image is None:
        return None
    seen = [str(Path(mount).resolve()) for mount in mounts or ()] or _named_by(configs)
    return Container(image, runtime="apptainer" if runtime == "apptainer" else "pyxis", mounts=tuple(seen))


def _named_by(configs: Sequence["RunConfig"]) -> list[str]:
    """Directories that the runs read and write, none inside another of them."""
    named = {Path.cwd()}
    for config in configs:
        named.add(Path(config.output_dir).resolve())
        data = config.data
        for source in (*(data.sources or ()), *(data.train or ()), *(data.valid or ())):
            named.add(Path(source.prefix).resolve().parent)
        tokenizer = Path(data.tokenizer).resolve()
        if tokenizer.is_file():
            named.add(tokenizer.parent)
    return [str(path) for path in sorted(named) if not named & set(path.parents)]


def training_job(
    configs: Sequence["RunConfig"], resources: "Resources", *, container: "Container | None", python: str | None
) -> "TrainingJob":
    """The job that trains ``configs``, called after the first of them; ``python`` is what the ranks start."""
    from megatron_ext.slurm.job import TrainingJob

    run_dirs = tuple(absolute(config.run_dir) for config in configs)
    return TrainingJob(
        name=configs[0].name,
        run_dirs=run_dirs,
        work_dir=absolute(Path()),
        output=run_dirs[0] / "slurm",
        python=python or ("python3" if container else sys.executable),
        resources=resources,
        container=container,
    )


def check_runs(configs: Sequence["RunConfig"], resources: "Resources", *, dry_run: bool) -> None:
    """Find at submission what the ranks would find: data, plans, batches that do not divide, checkpoints of others.

    In a dry run, which may be made where the data is not (or not yet), what is wrong with data is only said.

    Raises:
        UserError: one of the runs cannot be trained; it is named where there are several.
    """
    checked: set[str] = set()
    for config in configs:
        try:
            _check_run(config, resources)
            _check_data(config, checked, dry_run=dry_run)
        except UserError as error:
            raise UserError(f"{config.name}: {error}" if len(configs) > 1 else str(error)) from None


def _check_run(config: "RunConfig", resources: "Resources") -> None:
    from megatron_ext.checkpoint.store import check_resumable, newest_checkpoint, read_manifest
    from megatron_ext.curriculum.sampler import check_batches_divide

    tensor, ranks = config.parallel.tensor, resources.ranks
    if ranks % tensor:
        raise UserError(
            f"parallel.tensor is {tensor}, which does not divide the {ranks} rank(s) of {resources.nodes} node(s): "
            "change --nodes, --gpus-per-node or --tasks-per-node"
        )
    for plan in config.possible_plans().values():
        check_batches_divide(plan, ranks // tensor)
    newest = newest_checkpoint(config.run_dir / "checkpoints")
    if newest is not None:
        layout = {"world_size": ranks, "tensor": tensor, "zero_stage": config.parallel.zero_stage}
        determining = config.determining_values()
        check_resumable(read_manifest(newest), determining=determining, layout=layout, where=newest)


def _check_data(config: "RunConfig", checked: set[str], *, dry_run: bool) -> None:
    from megatron_ext.data.sources import check_data

    data = json.dumps([config.data.model_dump(mode="json"), config.model.vocab_size, config.training.seq_len])
    if data in checked:
        return
    checked.add(data)
    try:
        check_data(config.data, seq_len=config.training.seq_len, vocab_size=config.model.vocab_size)
    except UserError as error:
        if not dry_run:
            raise
        typer.echo(f"without --dry-run this would be refused: {error}", err=True)


def submit_job(
    job: "TrainingJob", configs: Sequence["RunConfig"], *, options: Sequence[str] = (), chained: bool = False
) -> str:
    """Write what the job needs into the run directories, submit it, and return its number.

    Args:
        job: The job.
        configs: What it trains, in the order of its run directories.
        options: Options of sbatch beside those of the script.
        chained: It waits for another job of the same runs, which therefore may be in the queue.

    Raises:
        UserError: there is no SLURM here, a run is in the queue already, or sbatch refused the job.
    """
    from megatron_ext.slurm import commands, record

    commands.require_slurm("a SLURM job")
    if not chained:
        refuse_queued(job.run_dirs)
    script = job.script()
    for run_dir, config in zip(job.run_dirs, configs, strict=True):
        record.prepare(run_dir, config=config.model_dump(mode="json"), script=script)
    job.output.mkdir(parents=True, exist_ok=True)
    number = commands.submit(script, options, remedy="Change the options of this command")
    for run_dir, name in zip(job.run_dirs, job.names(number), strict=True):
        record.record_submitted(run_dir, name)
    return number


def refuse_queued(run_dirs: Sequence[Path]) -> None:
    """Raise UserError where a job of one of the runs waits or runs."""
    for run_dir, job in live_jobs(run_dirs).items():
        raise UserError(f"{run_dir} has job {job} in the queue; wait for it, or end it with `scancel {job}`")


def live_jobs(run_dirs: Sequence[Path]) -> Mapping[Path, str]:
    """The job of each run that has one in the queue, or perhaps has: the controller may not answer."""
    from megatron_ext.slurm import commands, record

    jobs = {run_dir: [job.job for job in record.jobs_of(run_dir) if job.may_be_queued] for run_dir in run_dirs}
    found = commands.queue(job for names in jobs.values() for job in names)
    alive = {
        run_dir: next((name for name in names if not found[name].is_over), None) for run_dir, names in jobs.items()
    }
    return {run_dir: name for run_dir, name in alive.items() if name is not None}


def absolute(path: Path) -> Path:
    """``path`` from the root on, symbolic links as the user wrote them: a node may reach them another way."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
