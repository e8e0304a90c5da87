"""The command line's entry point: finds each command's module when it is asked for, and turns errors into exit codes.

The command NAME is the function ``command`` of cli/NAME.py, with typer annotations; its docstring is the help text and
ends with an example. A group of commands is a ``typer.Typer`` called ``NAME_app`` instead. Modules must import torch
and what needs it inside their functions, so that help and the commands without torch answer at once.
"""

import sys
from importlib import import_module
from typing import Annotated, Any, Final

import typer
import typer.core

from megatron_ext import __version__
from megatron_ext.errors import UserError

COMMANDS: Final = (
    "doctor",
    "schema",
    "validate",
    "plan",
    "tokenizer",
    "preprocess",
    "data",
    "train",
    "preflight",
    "submit",
    "status",
    "tune",
    "generate",
    "analyze",
    "report",
    "experiment",
    "kernels",
    "demo",
)


class _LazyGroup(typer.core.TyperGroup):
    """A group whose commands are imported when they are named, or all of them for the group's own help."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Names of the commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The command called ``cmd_name``, or None."""
        return _load(cmd_name) if cmd_name in COMMANDS else None


def _load(name: str) -> Any:
    module = import_module(f"megatron_ext.cli.{name}")
    group = getattr(module, f"{name}_app", None)
    if group is not None:
        command: Any = typer.main.get_group(group)
        command.name = name
    else:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(module.command)
        command = typer.main.get_command(app)
    for part in (command, *getattr(command, "commands", {}).values()):
        part.help = _with_example_on_one_line(part.help or "")
    return command


def _with_example_on_one_line(text: str) -> str:
    """Help text whose example is not wrapped, so that it can be copied (click leaves what follows a ``\\b`` alone)."""
    return text.replace("\n\nExample: ", "\n\n\b\nExample: ")


app = typer.Typer(cls=_LazyGroup, no_args_is_help=True, rich_markup_mode=None, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megatron-ext {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrain GPT-2 and GPT-3 models with Sequence Length Warmup.

    Example: megatron-ext validate configs/gpt2/117m_slw.json
    """


def main() -> None:
    """Run the command that ``sys.argv`` names.

    Exits with 0 when it is done, 2 for input that the user has to change (one message on stderr, no traceback), 130
    when interrupted, and 1 for a run that failed.
    """
    try:
        typer.main.get_command(app)(prog_name="megatron-ext")
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        from megatron_ext.runtime.places import explain

        if (text := explain(error)) is None:
            raise
        typer.echo(f"error: {text}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
