"""The options that say what a SLURM job occupies, and what is checked at submission: ``submit``, ``experiment run``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig
    from megatron_ext.launch.job_script import Container, Resources

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
    from megatron_ext.launch.job_script import Resources

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
    from megatron_ext.launch.job_script import Container

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
    from megatron_ext.checkpoint.store import newest_checkpoint
    from megatron_ext.checkpoint.verify import check_resumable, read_manifest
    from megatron_ext.launch.launcher import check_run

    ranks, parallel = resources.ranks, config.parallel
    check_run(config, ranks)
    newest = newest_checkpoint(config.run_dir / "checkpoints")
    if newest is not None:
        layout = {"world_size": ranks, "tensor": parallel.tensor, "zero_stage": parallel.zero_stage}
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
