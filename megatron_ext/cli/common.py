"""What several commands share: arguments, options in groups, and tables."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_ext.launch.launcher import Target

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="JSON file of a run.", show_default=False)]

ExperimentPath = Annotated[Path, typer.Argument(metavar="FILE", help="JSON file of an experiment.", show_default=False)]

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the config, e.g. training.seq_len=512; may be repeated.",
        show_default=False,
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer wants it: a parameter that is a dataclass becomes an option for each of its fields."""
    signature = inspect.signature(command, eval_str=True)
    annotations: dict[str, Any] = {name: one.annotation for name, one in signature.parameters.items()}
    groups: dict[str, Any] = {name: group for name, group in annotations.items() if is_dataclass(group)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter)
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            option = parameter.replace(name=field.name, annotation=hints[field.name], default=field.default)
            parameters.append(option)

    @functools.wraps(command)
    def called(*arguments: Any, **given: Any) -> None:
        for name, group in groups.items():
            own = {field.name: given.pop(field.name) for field in fields(group) if field.name in given}
            given[name] = group(**own)
        command(*arguments, **given)

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


@dataclass(frozen=True)
class TargetOptions:
    """Where ranks run: ``train`` and ``preflight``."""

    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Ranks on this machine; by default one per GPU, or one on a CPU."),
    ] = None
    master_port: Annotated[
        int | None,
        typer.Option("--master-port", min=1, max=65535, help="Port where ranks meet; by default a free one."),
    ] = None
    hostfile: Annotated[
        Path | None,
        typer.Option(
            "--hostfile", help="Run on the hosts of this file, `NAME slots=N` a line, over ssh.", metavar="FILE"
        ),
    ] = None
    include: Annotated[
        str,
        typer.Option("--include", help="Only these hosts or slots: NAME[:SLOT,SLOT][@NAME...].", show_default=False),
    ] = ""
    exclude: Annotated[
        str, typer.Option("--exclude", help="All but these hosts or slots, in the same form.", show_default=False)
    ] = ""

    def target(self) -> "Target":
        """The hosts and their ranks.

        Raises:
            UserError: the options contradict each other or the hostfile.
        """
        from megatron_ext.launch.hosts import choose_hosts, read_hostfile
        from megatron_ext.launch.launcher import Target, this_machine

        if self.hostfile is None:
            if self.include or self.exclude:
                raise UserError("--include and --exclude choose among the hosts of --hostfile, which is not given")
            return this_machine(self.nproc, master_port=self.master_port)
        if self.nproc is not None:
            raise UserError("--nproc is for this machine; the hostfile's slots say how many ranks a host has")
        hosts = choose_hosts(read_hostfile(self.hostfile), include=self.include, exclude=self.exclude)
        return Target(tuple(hosts), master_port=self.master_port)


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers in the value of an option; UserError where it is anything else."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} is {text!r}: write whole numbers separated by commas, for example 8,16,32")
    return numbers


def table(*columns: str, left: frozenset[str] = frozenset(), no_wrap: bool = True, title: str | None = None) -> "Table":
    """A table of numbers, and of text in the columns ``left``; with ``no_wrap`` numbers are not broken into lines."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for name in columns:
        made.add_column(name, justify="left" if name in left else "right", no_wrap=no_wrap and name not in left)
    return made
