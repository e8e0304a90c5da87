"""``megatron-ext data``: token files examined."""

from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@data_app.callback()
def _root() -> None:
    """Token files.

    Example: megatron-ext data verify data/corpus
    """


@data_app.command("verify")
def verify(
    prefixes: Annotated[
        list[str], typer.Argument(metavar="PREFIX...", help="Token files, without .bin or .idx.", show_default=False)
    ],
) -> None:
    """Read token files from end to end: are they whole, and those that were written?

    With the PREFIX.json of `preprocess` the checksums of both files are compared and the range of ids; files of other
    tools can only be compared with themselves.

    Example: megatron-ext data verify data/corpus
    """
    from megatron_ext.data.verify import verify

    for prefix in prefixes:
        found = verify(prefix)
        against = f"right by {' and '.join(found.against)}" if found.against else "nothing to compare with"
        low, high = found.ids
        typer.echo(f"{prefix}: {found.documents:,} documents, {found.tokens:,} tokens, ids {low} to {high}; {against}")
