"""``megatron-ext schema``: the JSON Schema of run configs."""

import json
from typing import Annotated

import typer

from megatron_ext.config.schema import run_schema


def command(
    *,
    partial: Annotated[
        bool, typer.Option("--partial", help="For files that extend others: no key is required.")
    ] = False,
) -> None:
    """Print the JSON Schema of a run config, with a description of every key.

    Example: megatron-ext schema > run.schema.json
    """
    typer.echo(json.dumps(run_schema(partial=partial), indent=2))
