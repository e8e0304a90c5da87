"""What ``submit`` and ``experiment run`` share: the options of a SLURM job, and what is checked at submission."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.errors import UserError
from megatron_ext.launch.job_script import Container, Containers, Resources
from megatron_ext.launch.slurm import training_job

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig
    from megatron_ext.launch.job_script import TrainingJob


@dataclass(frozen=True)
class SlurmOptions:
    """A job and what it occupies."""

    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a job.")] = 1
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each node, one rank on each.", show_default="none: CPUs")
    ] = None
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks of each node.", show_default="one per GPU, or one")
    ] = None
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPU cores of each rank.")] = None
    partition: Annotated[str | None, typer.Option(help="Partition to submit to.")] = None
    time: Annotated[str | None, typer.Option(metavar="LIMIT", help="Time limit: MINUTES, HH:MM:SS or D-HH:MM:SS.")] = (
        None
    )
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None
    signal_seconds: Annotated[
        int | None,
        typer.Option(
            help="Stop, save and requeue this long before the limit; more than a step and a checkpoint take.",
            show_default="300, of a short limit a tenth",
        ),
    ] = None
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another option of sbatch, e.g. qos=high; may be repeated."),
    ] = None
    container: Annotated[str | None, typer.Option(metavar="IMAGE", help="Image in which the ranks run.")] = None
    container_runtime: Annotated[Containers, typer.Option(help="pyxis (srun --container-image) or apptainer.")] = (
        "pyxis"
    )
    mounts: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="PATH",
            help="Path that the container sees as well; may be repeated.",
            show_default="the working and output directories, and those of the data",
        ),
    ] = None
    python: Annotated[
        str | None, typer.Option(help="Python of the ranks.", show_default="this one; in a container python3")
    ] = None

    def job(self, configs: Sequence["RunConfig"]) -> "TrainingJob":
        """The job that trains ``configs``; by default its container sees what they name."""
        resources = Resources(
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            tasks_per_node=self.tasks_per_node or self.gpus_per_node or 1,
            cpus_per_task=self.cpus_per_task,
            partition=self.partition,
            account=self.account,
            time=self.time,
            signal_seconds=self.signal_seconds,
            extra=tuple(self.sbatch or ()),
        )
        image = None
        if self.container is not None:
            seen = [str(Path(mount).resolve()) for mount in self.mounts or ()] or _named_by(configs)
            image = Container(self.container, runtime=self.container_runtime, mounts=tuple(seen))
        return training_job(configs, resources, container=image, python=self.python)


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
