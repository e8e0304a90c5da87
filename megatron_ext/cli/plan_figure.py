"""One picture of a plan: sequence length, batch size and learning rate against steps and against tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.errors import UserError

_COLORS: Final = ("#0072B2", "#D55E00")
_FORMATS: Final = (".png", ".pdf", ".svg")


def draw_plan(plans: Mapping[str, TrainingPlan], output: Path) -> None:
    """Write the picture of a plan, or of the two that bound one, with their names, in the format of its suffix.

    Raises UserError if the suffix is not one of a picture, or the file cannot be written.
    """
    if output.suffix not in _FORMATS:
        raise UserError(f"--plot {output}: the name must end in {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}")
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
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
