"""``megatron-ext schema``: the JSON Schema of run configs, and the same as a page to read."""

import json
from typing import Annotated

import typer

from megatron_ext.config.schema import reference, run_schema
from megatron_ext.errors import UserError


def command(
    *,
    partial: Annotated[
        bool, typer.Option("--partial", help="For files that extend others: no key is required.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/config.md, a page for people, instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of a run config, with a description of every key.

    Example: megatron-ext schema > run.schema.json
    """
    if markdown and partial:
        raise UserError("--partial is about the JSON Schema; leave it out with --markdown")
    typer.echo(reference().rstrip() if markdown else json.dumps(run_schema(partial=partial), indent=2))
