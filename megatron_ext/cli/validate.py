"""``megatron-ext validate``: is this config right, and what does it say."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from megatron_ext.cli.common import AsJson, ConfigPath, Overrides
from megatron_ext.config.loading import load_config
from megatron_ext.config.messages import ConfigError
from megatron_ext.config.resolved import resolved_json
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.errors import UserError
from megatron_ext.runtime.places import problem_of, unusable


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    as_json: AsJson = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the resolved config, every value in one file, for ranks that another launcher starts.",
        ),
    ] = None,
) -> None:
    """Check a run config and say in a few lines what it describes.

    Prints every problem it finds, each with its key, the value found and what to write, and exits with 2.

    Example: megatron-ext validate configs/gpt2/117m_slw.json --set training.batch_size=256
    """
    try:
        run = load_config(config, overrides or ())
        try:
            plan = run.plan()
        except UserError as error:
            # It compares durations that only a plan can compare, steps with tokens.
            raise UserError(f"{config}: {error}") from None
    except UserError as error:
        if not as_json:
            raise
        problems = error.problems if isinstance(error, ConfigError) else (str(error),)
        typer.echo(json.dumps({"ok": False, "problems": problems}, indent=2))
        raise typer.Exit(2) from None
    if output is not None:
        try:
            output.write_text(resolved_json(run), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error}") from None
    problem = problem_of(run.run_dir)
    warnings = [] if problem is None else [unusable(run.run_dir, problem)]
    if as_json:
        totals = {"steps": plan.steps, "tokens": plan.tokens, "samples": plan.samples}
        answer = {
            "ok": True,
            "warnings": warnings,
            **totals,
            "digest": run.digest(),
            "config": run.model_dump(mode="json"),
        }
        typer.echo(json.dumps(answer, indent=2))
        return
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    lines = [*summary(run), f"plan        {_totals(plan, list(run.possible_plans().values()))}"]
    typer.echo("\n".join([f"OK: {config}", *(f"  {line}" for line in lines)]))


def _totals(plan: TrainingPlan, plans: Sequence[TrainingPlan]) -> str:
    """Steps, tokens and samples; from the least to the most of ``plans`` where the run decides as it goes."""
    if len(plans) == 1:
        return f"{plan.steps:,} steps, {plan.tokens:,} tokens, {plan.samples:,} samples"
    steps, tokens = sorted(each.steps for each in plans), sorted(each.tokens for each in plans)
    budget = plan.duration.tokens
    amount = f"{tokens[0]:,} to {tokens[-1]:,} tokens" if budget is None else f"{budget:,} tokens or up to a batch more"
    return f"{steps[0]:,} to {steps[-1]:,} steps, {amount}, at most {plan.samples:,} samples"


def summary(run: RunConfig) -> list[str]:
    """What a run config says, one aspect a line."""
    model, training, rate = run.model, run.training, run.learning_rate
    lines = [
        f"run         {run.run_dir}",
        f"model       {model.num_layers} layers, width {model.hidden_size}, {model.num_attention_heads} heads, "
        f"{model.vocab_size:,} tokens in the vocabulary",
        f"training    {training.duration}, {training.batch_size} sequences of up to {training.seq_len} tokens a step, "
        f"{training.precision}",
        f"curriculum  {run.curriculum.describe(training.seq_len)}",
        f"LR          {rate.peak:g} after {rate.warmup or 'no warmup'}, {rate.decay} decay to {rate.min:g}",
        f"layout      {run.parallel.tensor} tensor rank(s), ZeRO {run.parallel.zero_stage}, "
        f"{run.micro_batch_tokens:,} tokens a micro-batch",
    ]
    if training.batch_size_warmup is not None:
        warmup = training.batch_size_warmup
        lines.insert(3, f"batch size  from {warmup.start} by {warmup.increment} over {warmup.duration}")
    return lines
