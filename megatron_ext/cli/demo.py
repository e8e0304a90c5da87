"""``demo``: from nothing to a trained GPT, its perplexity, a sample and a picture, in minutes on a laptop."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli import generate, preprocess, report, tokenizer

if TYPE_CHECKING:
    from megatron_ext.config.data import DataConfig

_PROMPT = "ROMEO"


def command(
    config: Annotated[Path, typer.Option(help="The run to make.")] = Path("configs/demo/shakespeare.json"),
    *,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes that train together.")] = 2,
    data_only: Annotated[bool, typer.Option("--data-only", help="Only make text, vocabulary and token files.")] = False,
) -> None:
    """Train a small GPT with Sequence Length Warmup on real text, through the deepspeed launcher.

    Prints each command before it runs it. Text, vocabulary and token files are made at the first call and kept, and a
    run that was interrupted goes on. Remove the run's directory to start over.

    Example: megatron-ext demo
    """
    from megatron_ext.config.loading import load_config
    from megatron_ext.launch.launcher import launch, this_machine

    run = load_config(config)
    prefix = _make_data(run.data, vocab_size=run.model.vocab_size)
    if data_only:
        typer.echo(f"token files: {prefix}.bin, .idx; vocabulary: {run.data.tokenizer}")
        return
    _say(f"train {config} --nproc {nproc}")
    status = launch(this_machine(nproc), run)
    if status:
        raise typer.Exit(status)
    _say(f'generate {run.run_dir} --prompt "{_PROMPT}"')
    generate.command(run.run_dir, prompt=_PROMPT)
    for name in ("report.html", "report.png"):
        _say(f"report {run.run_dir} --output {run.run_dir / name}")
        report.command([run.run_dir], output=run.run_dir / name)
    _summary(run.run_dir, vocab_size=run.model.vocab_size)


def _make_data(data: "DataConfig", *, vocab_size: int) -> Path:
    """Make what is missing of the text, the vocabulary and the token files; the prefix of the latter."""
    from megatron_ext.data.corpus import write_demo_corpus

    assert data.sources is not None, "the demo's config names one source"
    prefix, vocabulary = Path(data.sources[0].prefix), Path(data.tokenizer)
    text = prefix.with_suffix(".jsonl")
    if not text.exists():
        summary = write_demo_corpus(text)
        typer.echo(f"{text}: {summary.source}, {summary.documents:,} documents, {summary.characters:,} characters")
    if not vocabulary.exists():
        _say(f"tokenizer train {text} --vocab-size {vocab_size} --output {vocabulary}")
        tokenizer.train([text], vocab_size=vocab_size, output=vocabulary)
    if not prefix.with_suffix(".idx").exists():
        _say(f"preprocess {text} --output {prefix} --tokenizer {vocabulary} --workers 2")
        preprocess.command([text], output=prefix, tokenizer=str(vocabulary), workers=2)
    return prefix


def _summary(run_dir: Path, *, vocab_size: int) -> None:
    import math

    from megatron_ext.metrics.reading import read_metrics

    metrics = read_metrics(run_dir)
    first, last = metrics.train[0], metrics.evaluations[-1]
    uniform = math.log(vocab_size)
    typer.echo(
        f"\nLengths {first.seq_len} to {metrics.train[-1].seq_len} over {len(metrics.train)} steps, "
        f"{last.tokens:,} tokens.\n"
        f"Validation loss {last.loss:.3f} ({last.loss / uniform:.0%} of ln(vocabulary) = {uniform:.3f}), "
        f"perplexity {last.perplexity:.1f}.\n"
        f"To open in a browser: {run_dir / 'report.html'}\n"
        f"Picture: {run_dir / 'report.png'}"
    )


def _say(arguments: str) -> None:
    typer.echo(f"\n$ megatron-ext {arguments}", err=True)
