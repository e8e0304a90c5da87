"""The page: what it holds, and how it looks and acts in a browser; the picture of any run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_ext.analysis.comparison import compare
from megatron_ext.analysis.figure import draw_runs, legend_text
from megatron_ext.analysis.report import report_page
from megatron_ext.analysis.run_data import RunData
from tests.analysis.browser import browser, inspect
from tests.analysis.runs import run_data

HOSTILE = '</script><img src=x onerror="document.documentElement.dataset.error=1"><b>&amp;{{TABLE}}</b>'
SCRIPT = (Path(__file__).parent / "inspect_report.js").read_text(encoding="utf-8")


def page(runs: list[RunData], title: str = "runs") -> str:
    return report_page(runs, compare(runs), title=title)


def embedded(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match
    found = json.loads(match[1])
    assert isinstance(found, dict)
    return found


def runs_to_look_at() -> list[RunData]:
    """Spikes, a divergence, long and hostile names, tiny and huge numbers, and a run of one step."""
    rng = np.random.default_rng(3)
    steps = 900
    ratio = 1 + np.abs(rng.standard_normal(steps)) * 0.05
    ratio[300:310] = np.linspace(2.8, 1.1, 10)
    loss = 2 + 8 * np.exp(-np.arange(steps) / 90) + rng.standard_normal(steps) * 0.05
    diverged = np.where(np.arange(steps) < 600, loss, np.nan)
    variance: dict[str, Any] = {
        "adam_var_l1": 1e3 * np.exp(-np.arange(steps) / 60),
        "adam_var_max": np.full(steps, 3.3e-7),
    }
    checks = {step: 2 + 300 / step for step in range(100, steps + 1, 100)}
    lengths = np.minimum(8 + np.arange(steps) // 40 * 8, 128)
    return [
        run_data("baseline", steps=steps, loss=diverged, loss_ratio=ratio, valid=checks, **variance),
        run_data(HOSTILE, steps=steps, loss=loss, loss_ratio=ratio, seq_len=lengths, valid=checks, **variance),
        run_data("a-run-with-a-name-" * 6, steps=steps, loss=loss * 40, lr=np.full(steps, 1.5e-9), valid=checks),
        run_data("one step", steps=1),
    ]


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_is_legible_and_answers_in_a_browser(width: int, tmp_path: Path) -> None:
    runs = runs_to_look_at()
    found = inspect(page(runs, title=HOSTILE), SCRIPT, width=width, folder=tmp_path)
    assert "failed" not in found, found
    assert (found["error"], found["ready"], found["width"]) == (None, "1", width)
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["wide"] <= 0, "the page scrolls sideways"
    assert found["requests"] == []
    assert found["intruders"] == 0
    assert found["sizes"] == ["12px"]
    assert "Loss ratio" in found["titles"]
    assert "Gradient variance, maximum" in found["titles"]
    assert min(found["curves"]) >= 1
    assert all(min(counts) >= 2 for counts in found["ticks"]), found["ticks"]
    assert {"1.1", "1.5", "2"} <= set(found["thresholds"])
    assert found["covered"] == 0, "thresholds are drawn over the curves"
    assert found["legend"] == [run.label for run in runs]
    assert found["pointed"]["shown"]
    assert found["pointed"]["inside"]
    assert found["pointed"]["gone"]
    assert "baseline" in found["pointed"]["text"]
    assert HOSTILE in found["typed"]
    assert found["hidden"]["before"] > found["hidden"]["after"] == 0
    assert found["hidden"]["again"] == found["hidden"]["before"]
    assert found["hidden"]["pressed"] == "false"
    assert found["colors"]["light"] == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    assert found["colors"]["dark"] == ["rgb(16, 20, 24)", "rgb(231, 235, 240)"]


class _Elements(HTMLParser):
    """Every element's name and attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_names_stay_text_and_nothing_is_loaded() -> None:
    text = page(runs_to_look_at(), title=HOSTILE)
    elements = _Elements(text)
    assert {tag for tag, _ in elements.found}.isdisjoint({"img", "b", "link", "iframe"})
    assert not [attributes for _, attributes in elements.found if {"src", "href"} & attributes.keys()]
    assert text.count("</script>") == 2
    assert HOSTILE in elements.text
    assert embedded(text)["groups"][1] == HOSTILE
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", text)
    assert not re.search(r"https?://|@import|url\(", outside)


def test_what_was_not_recorded_is_named_instead_of_drawn_empty() -> None:
    text = page([run_data("a"), run_data("b")])
    titles = [panel["title"] for panel in embedded(text)["panels"]]
    assert "Validation loss" not in titles
    assert "Batch size" not in titles
    assert "Not recorded by these runs: validation loss, loss over the first tokens, gradient variance, norm" in text
    growing = [run_data("a", batch_size=np.arange(1, 51)), run_data("b")]
    assert "Batch size" in [panel["title"] for panel in embedded(page(growing))["panels"]]


def test_curves_carry_every_spike_and_mark_what_is_not_finite() -> None:
    loss = np.full(5000, 3.0)
    loss[[7, 1234, 4998]] = [9.0, 11.0, 13.0]
    loss[2000:2010] = np.nan
    data = embedded(page([run_data("a", steps=5000, loss=loss)]))
    for panel in data["panels"][:2]:
        [series] = panel["series"]
        assert {9.0, 11.0, 13.0} <= set(series["y"])
        assert len(series["broken"]) == 10
        assert series["x"] == sorted(series["x"])


def test_seeds_share_a_group() -> None:
    runs = [run_data(f"{variant}-seed{seed}", group=variant) for variant in ("slw", "base") for seed in (1, 2)]
    data = embedded(page(runs))
    assert data["groups"] == ["slw", "base"]
    assert [run["group"] for run in data["runs"]] == [0, 0, 1, 1]


def test_five_runs_of_50_000_steps_make_a_small_page() -> None:
    rng, steps = np.random.default_rng(0), 50_000
    noisy = ("loss", "prefix_loss", "loss_ratio", "grad_norm", "tokens_per_s", "adam_var_l1", "adam_var_max", "lr")
    columns: dict[str, Any] = {name: 1 + np.abs(rng.standard_normal(steps)) for name in noisy}
    runs = [run_data(f"run {number}", steps=steps, **columns) for number in range(5)]
    assert len(page(runs).encode()) < 3_000_000


def run_of(values: list[float], *, label: str = "run", **changes: Any) -> RunData:
    return run_data(label, steps=len(values), loss=values, **changes)


@pytest.mark.parametrize(
    "runs",
    [
        [run_of([5.0])],
        [run_of([math.nan])],
        [run_of([math.inf, 5.0, math.nan, 4.0])],
        [run_of([5.0, 500.0, 4.0], label="spike"), run_of([5.0, 4.0], label="_hidden name")],
        [run_of([5.0, 4.0], label="x" * 200)] * 9,
        [run_of(list(np.linspace(9, 2, 5000)))],
        [run_of([0.0, 0.0], lr=[0.0, 0.0])],
    ],
    ids=["one step", "only nan", "gaps", "spike", "many runs", "long", "zeros"],
)
def test_any_run_is_drawn(runs: list[RunData], tmp_path: Path) -> None:
    draw_runs(runs, tmp_path / "report.png")
    image = imread(tmp_path / "report.png")
    assert image.shape[0] > 800
    assert image.shape[1] > 1200
    assert image.std() > 0.01


@pytest.mark.parametrize(
    ("label", "text"),
    [("slw", "slw"), ("_run", " _run"), ("a$b$", r"a\$b\$"), ("x" * 200, "…" + "x" * 59)],
)
def test_labels_are_shown_as_they_are(label: str, text: str) -> None:
    assert legend_text(label) == text
