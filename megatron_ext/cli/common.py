"""Arguments that several commands take, so that they are called and explained the same way everywhere."""

from pathlib import Path
from typing import Annotated

import typer

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
