"""``megatron-ext tokenizer``: train a byte-level BPE."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_ext.errors import UserError

tokenizer_app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@tokenizer_app.callback()
def _root() -> None:
    """Tokenizers.

    Example: megatron-ext tokenizer train corpus.jsonl --vocab-size 8192 --output tokenizer.json
    """


@tokenizer_app.command("train")
def train(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="JSON lines or text files.", show_default=False)
    ],
    *,
    vocab_size: Annotated[int, typer.Option(help="Tokens, <|endoftext|> and the 256 bytes included.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The tokenizers JSON file to write.")],
    json_key: Annotated[str, typer.Option(help="Key of the text in JSON lines.")] = "text",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Train a byte-level BPE with GPT-2's pre-tokenization on text.

    Example: megatron-ext tokenizer train corpus.jsonl --vocab-size 8192 --output tokenizer.json
    """
    from megatron_ext.data.reading import check_files, read_texts
    from megatron_ext.data.tokenizers import save_tokenizer, train_tokenizer

    check_files(tuple(files))
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; choose another --output or add --overwrite")
    tokenizer = train_tokenizer(read_texts(tuple(files), json_key), vocab_size=vocab_size)
    save_tokenizer(tokenizer, output)
    typer.echo(f"{output}: {tokenizer.vocab_size:,} tokens, end of document is {tokenizer.eod}")
    if tokenizer.vocab_size < vocab_size:
        typer.echo(f"warning: the text has too few repeated pairs for {vocab_size:,} tokens", err=True)
