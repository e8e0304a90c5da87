"""``megatron-ext preprocess``: text to token files."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_ext.data.preprocess import PreprocessOptions, PreprocessProgress


def command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="JSON lines or text files.", show_default=False)
    ],
    *,
    output: Annotated[Path, typer.Option("--output", metavar="PREFIX", help="Writes PREFIX.bin, .idx and .json.")],
    tokenizer: Annotated[str, typer.Option(help="gpt2, or the path of a tokenizers JSON file.")] = "gpt2",
    workers: Annotated[int, typer.Option(help="Processes that tokenize; the output is the same for any number.")] = 1,
    json_key: Annotated[str, typer.Option(help="Key of the text in JSON lines.")] = "text",
    append_eod: Annotated[bool, typer.Option(help="End every document with the end-of-document token.")] = True,
    skip_invalid: Annotated[bool, typer.Option(help="Count broken records and go on; by default they end it.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace existing output.")] = False,
) -> None:
    """Turn text into token files that training reads (Megatron's .bin and .idx format).

    Files named .jsonl, .json or .ndjson hold one JSON object a line; any other file is one document of plain text. Both
    may be compressed (.gz, .zst; a bare .gz or .zst is JSON lines).

    Example: megatron-ext preprocess corpus.jsonl.gz --output data/corpus --tokenizer gpt2 --workers 4
    """
    from megatron_ext.data.preprocess import PreprocessOptions

    options = PreprocessOptions(
        tokenizer=tokenizer,
        json_key=json_key,
        append_eod=append_eod,
        workers=workers,
        skip_invalid=skip_invalid,
        overwrite=overwrite,
    )
    last = _run(tuple(files), output, options)
    if last.invalid:
        typer.echo(f"warning: {last.invalid:,} invalid records skipped, the first: {last.first_invalid}", err=True)
    empty = f", {last.empty:,} empty ones left out" if last.empty else ""
    typer.echo(f"{output}.bin: {last.documents:,} documents{empty}, {last.tokens:,} tokens")


def _run(files: tuple[Path, ...], output: Path, options: "PreprocessOptions") -> "PreprocessProgress":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from megatron_ext.data.preprocess import preprocess_steps
    from megatron_ext.data.reading import check_files

    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[tokens]:,} tokens"))
    total = check_files(files)
    last: PreprocessProgress | None = None
    with Bar(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task("", total=total, tokens=0)
        for last in preprocess_steps(files, output, options):
            bar.update(task, completed=last.bytes_read, tokens=last.tokens)
    assert last is not None
    return last
