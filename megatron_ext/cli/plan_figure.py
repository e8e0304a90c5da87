"""One picture of a plan: sequence length, batch size and learning rate against steps and against tokens."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.errors import UserError


def draw_plan(plan: TrainingPlan, output: Path) -> None:
    """Write the picture as a PNG.

    Raises UserError if the file cannot be written.
    """
    rows = plan.arrays()
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 2, sharex="col", sharey="row")
    columns = (("step", rows.step), ("tokens consumed", rows.consumed_tokens))
    quantities = (
        ("tokens per sequence", rows.seq_len),
        ("sequences per batch", rows.batch_size),
        ("learning rate", rows.lr),
    )
    for panel_row, (name, values) in zip(panels, quantities, strict=True):
        for axes, (_, at) in zip(panel_row, columns, strict=True):
            axes.plot(at, values, color="#0072B2", drawstyle="steps-post")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
        panel_row[0].set_ylabel(name)
    for axes, (label, _) in zip(panels[-1], columns, strict=True):
        axes.set_xlabel(label)
    figure.suptitle(f"{plan.steps:,} steps, {plan.tokens:,} tokens")
    try:
        figure.savefig(output, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"--plot {output} cannot be written ({error.strerror}): pass another file") from error
