"""``megatron-ext plan``: what a run will do and cost, before a device is taken."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_ext.cli.common import AsJson, ConfigPath, Overrides, table
from megatron_ext.config.loading import load_config
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan
from megatron_ext.curriculum.sampler import check_batches_divide, data_parallel_size, micro_batch_sizes
from megatron_ext.curriculum.segments import Segment
from megatron_ext.errors import UserError
from megatron_ext.model.counts import (
    MemoryEstimate,
    ParameterCount,
    count_parameters,
    estimate_memory,
    full_length_flops,
    run_flops,
)
from megatron_ext.text import format_count, format_duration

_ROWS = 12
"""Rows of the table of lengths."""

_COLORS: Final = ("#0072B2", "#D55E00")
_FORMATS: Final = (".png", ".pdf", ".svg")


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Devices of the run, a multiple of parallel.tensor.",
            show_default="parallel.tensor: one replica",
        ),
    ] = None,
    device_tflops: Annotated[
        float | None,
        typer.Option(
            help="Peak rate of one device at the run's precision, in TFLOP/s; gives the time.", show_default=False
        ),
    ] = None,
    mfu: Annotated[float, typer.Option(help="Share of that rate which the run is expected to reach.")] = 0.4,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw length, batch size and LR by steps and tokens; .png, .pdf or .svg.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show a run before it starts: steps, tokens, lengths, learning rate, parameters, FLOPs, memory, time.

    Under adaptive pacing these are the fastest and the slowest plan, between which the run decides.

    Example: megatron-ext plan configs/gpt2/1.5b_slw.json --ranks 64 --device-tflops 312 --plot plan.png
    """
    run = load_config(config, overrides or ())
    plans, ranks = run.possible_plans(), ranks or run.parallel.tensor
    reports = {which: PlanReport(run, plan, ranks, device_tflops, mfu) for which, plan in plans.items()}
    if plot is not None:
        draw_plan(plans, plot)
    if as_json:
        answers = {which: report.to_json() for which, report in reports.items()}
        typer.echo(json.dumps(answers if len(answers) > 1 else next(iter(answers.values())), indent=2))
        return
    console = Console(highlight=False)
    for which, report in reports.items():
        if len(reports) > 1:
            console.rule(f"The {which} plan", align="left")
        for shown in (_run_table(report), _length_table(report), _rate_table(report.plan), _cost_table(report)):
            console.print(shown)
    if plot is not None:
        console.print(f"Plot: {plot}", soft_wrap=True)


@dataclass(frozen=True)
class PlanReport:
    """A plan and its price on ``ranks`` devices.

    Raises:
        UserError: ranks do not divide into tensor-parallel groups or a batch over the data-parallel ranks, or a rate is
            not positive.
    """

    config: RunConfig
    plan: TrainingPlan
    ranks: int
    device_tflops: float | None = None
    """Peak rate of one device in TFLOP/s; None: no time is estimated."""

    mfu: float = 0.4
    """Share of the peak that the run reaches."""

    def __post_init__(self) -> None:
        try:
            check_batches_divide(self.plan, data_parallel_size(self.ranks, tensor=self.config.parallel.tensor))
        except UserError as error:
            raise UserError(f"--ranks is {self.ranks}: {error}") from None
        if self.device_tflops is not None and self.device_tflops <= 0:
            raise UserError(f"--device-tflops is {self.device_tflops:g}: pass a positive rate")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is {self.mfu:g}: pass a share above 0 and up to 1")

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // self.config.parallel.tensor

    def parameters(self, *, tensor: int = 1) -> ParameterCount:
        """All of them, or those of one of ``tensor`` tensor-parallel ranks."""
        return count_parameters(self.config.model, positions=self.config.max_positions, tensor=tensor)

    def flops(self, *, causal: bool = False) -> int:
        """Forward and backward of the whole run, attention in full or below the diagonal, at each step's length."""
        return run_flops(self.config.model, self.plan.segments, causal=causal)

    @property
    def full_length_flops(self) -> int:
        """``flops`` of as many tokens at the full length."""
        return full_length_flops(self.config.model, tokens=self.plan.tokens, seq_len=self.plan.seq_len)

    @property
    def saving(self) -> float:
        """Share of those that the short lengths save."""
        return 1 - self.flops() / self.full_length_flops

    @property
    def memory(self) -> MemoryEstimate:
        """Of a rank."""
        config = self.config
        return estimate_memory(
            config.model,
            config.parallel,
            precision=config.training.precision,
            positions=config.max_positions,
            seq_len=config.training.seq_len,
            data_size=self.data_size,
        )

    @property
    def seconds(self) -> float | None:
        """Training time at that rate; None without one."""
        if self.device_tflops is None:
            return None
        return self.flops() / (self.ranks * self.device_tflops * 1e12 * self.mfu)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the derived numbers filled in."""
        whole, rank = self.parameters(), self.parameters(tensor=self.config.parallel.tensor)
        return {
            "plan": self.plan.to_json(),
            "learning_rate": [asdict(step) for step in key_steps(self.plan)],
            "parameters": asdict(whole) | {"total": whole.total},
            "rank_parameters": asdict(rank) | {"total": rank.total},
            "flops": {
                "total": self.flops(),
                "causal": self.flops(causal=True),
                "full_length": self.full_length_flops,
                "saving": self.saving,
            },
            "memory_per_rank": asdict(self.memory) | {"device": self.memory.device},
            "ranks": self.ranks,
            "data_parallel": self.data_size,
            "device_tflops": self.device_tflops,
            "mfu": self.mfu,
            "estimated_seconds": self.seconds,
        }


def key_steps(plan: TrainingPlan) -> list[PlannedStep]:
    """First step, the end of the LR warmup, start, quarters and end of the decay within the run, and the last step."""
    rate = plan.learning_rate
    chosen = {0, plan.steps - 1}
    if rate.warmup:
        done = plan.step_at_tokens(rate.warmup) if rate.warmup_in_tokens else rate.warmup
        chosen.add(done - 1)
    if rate.shape != "constant":
        span = rate.decay_until - rate.decay_from
        points = (rate.decay_from + span * quarter // 4 for quarter in range(5))
        chosen |= {max(plan.step_at_tokens(point) - 1, 0) for point in points if point <= plan.tokens}
    return [plan[step] for step in sorted(chosen)]


def summarized(segments: Sequence[Segment], rows: int = _ROWS) -> list[Sequence[Segment]]:
    """Consecutive segments in at most ``rows`` groups; the first and the last segment stay alone."""
    if len(segments) <= rows:
        return [[segment] for segment in segments]
    inner = segments[1:-1]
    bounds = [len(inner) * group // (rows - 2) for group in range(rows - 1)]
    groups = [inner[start:end] for start, end in pairwise(bounds)]
    return [segments[:1], *groups, segments[-1:]]


def _run_table(report: PlanReport) -> Table:
    plan = report.plan
    shown = _pairs(f"Run {report.config.run_dir}")
    shown.add_row("steps", f"{plan.steps:,}")
    shown.add_row("tokens", f"{plan.tokens:,}")
    if plan.duration.tokens:
        shown.add_row("  budget", f"{plan.duration}, overshot by {plan.overshoot:,} (below one batch)")
    shown.add_row("samples", f"{plan.samples:,} of {plan.seq_len:,} tokens ({plan.tail})")
    used = plan.tokens / (plan.samples * plan.seq_len)
    shown.add_row("tokens used", f"{used:.1%} of those in the samples")
    return shown


def _length_table(report: PlanReport) -> Table:
    plan, data_size = report.plan, report.data_size
    columns = ("from step", "length", "batch", "tokens a step", "micro-batches", "tokens after")
    shown = table(*columns, title="Lengths and batches")
    for group in summarized(plan.segments):
        first, last = group[0], group[-1]
        lengths, tokens = [segment.seq_len for segment in group], [segment.step_tokens for segment in group]
        micro = [
            len(micro_batch_sizes(segment.batch_size // data_size, segment.seq_len, report.config.micro_batch_tokens))
            for segment in group
        ]
        shown.add_row(
            f"{first.first_step:,}",
            _span(min(lengths), max(lengths)),
            _span(first.batch_size, last.batch_size),
            _span(min(tokens), max(tokens), short=True),
            _span(min(micro), max(micro)),
            format_count(last.end_tokens),
        )
    return shown


def _rate_table(plan: TrainingPlan) -> Table:
    shown = table("step", "tokens after", "length", "LR", title="Learning rate")
    for step in key_steps(plan):
        consumed = step.consumed_tokens + step.tokens
        shown.add_row(f"{step.step:,}", f"{consumed:,}", f"{step.seq_len:,}", f"{step.lr:.4g}")
    return shown


def _cost_table(report: PlanReport) -> Table:
    memory, tensor = report.memory, report.config.parallel.tensor
    shown = _pairs(f"Cost on {report.ranks:,} rank(s): {report.data_size:,} data-parallel x {tensor} tensor-parallel")
    share = f", {report.parameters(tensor=tensor).total:,} on each tensor rank" if tensor > 1 else ""
    shown.add_row("parameters", f"{report.parameters().total:,}{share}")
    shown.add_row("FLOPs", f"{report.flops():.4g} (causal attention {report.flops(causal=True):.4g})")
    shown.add_row("  at full length", f"{report.full_length_flops:.4g} for as many tokens: {report.saving:.1%} saved")
    shown.add_row("memory a rank", f"{_gib(memory.device)}, estimated")
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        shown.add_row(f"  {name}", _gib(getattr(memory, name)))
    if memory.host:
        shown.add_row("  offloaded", f"{_gib(memory.host)} of host memory")
    if report.seconds is not None:
        rate = f"{report.device_tflops:g} TFLOP/s a device at {report.mfu:.0%} utilization"
        shown.add_row("time", f"{format_duration(report.seconds)} ({rate})")
    return shown


def _pairs(title: str) -> Table:
    pairs = Table(title=title, title_justify="left", show_header=False, box=SIMPLE)
    pairs.add_column(no_wrap=True)
    pairs.add_column(overflow="fold")
    return pairs


def _span(first: int, last: int, *, short: bool = False) -> str:
    write = format_count if short else "{:,}".format
    return write(first) if first == last else f"{write(first)}-{write(last)}"


def _gib(amount: int) -> str:
    return f"{amount / 2**30:,.2f} GiB"


def draw_plan(plans: Mapping[str, TrainingPlan], output: Path) -> None:
    """Write the picture of a plan, or of the two that bound one, with their names, in the format of its suffix.

    Raises UserError if the suffix is not one of a picture, or the file cannot be written.
    """
    if output.suffix not in _FORMATS:
        raise UserError(f"--plot {output}: the name must end in {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(3, 2, sharex="col", sharey="row")
    for (which, plan), color in zip(plans.items(), _COLORS, strict=False):
        rows = plan.arrays()
        for panel_row, values in zip(panels, (rows.seq_len, rows.batch_size, rows.lr), strict=True):
            for axes, at in zip(panel_row, (rows.step, rows.consumed_tokens), strict=True):
                axes.plot(at, values, color=color, drawstyle="steps-post", label=which)
    for panel_row, name in zip(panels, ("tokens per sequence", "sequences per batch", "learning rate"), strict=True):
        panel_row[0].set_ylabel(name)
        for axes in panel_row:
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
    for axes, label in zip(panels[-1], ("step", "tokens consumed"), strict=True):
        axes.set_xlabel(label)
    totals = {which: f"{plan.steps:,} steps, {plan.tokens:,} tokens" for which, plan in plans.items()}
    if len(plans) > 1:
        panels[0][0].legend(loc="lower right")
        totals = {which: f"{which}: {text}" for which, text in totals.items()}
    figure.suptitle("; ".join(totals.values()))
    try:
        figure.savefig(output, dpi=120)
    except OSError as error:
        raise UserError(f"--plot {output} cannot be written ({error.strerror}): pass another file") from error
