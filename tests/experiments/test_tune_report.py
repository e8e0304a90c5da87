"""The page and its picture."""

import math
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.experiments.tune import ProbeResult
from megatron_ext.experiments.tune_report import MARKDOWN, PICTURE, Findings, write_report
from megatron_ext.experiments.tune_search import Candidate, Point, verdict_of
from megatron_ext.experiments.tune_space import ProbeSettings

SETTINGS = ProbeSettings(threshold=1.3, steps=60, validate_every=10, validation_samples=8)


def result(duration: int, *perplexities: float, broken: tuple[int, ...] = ()) -> ProbeResult:
    points = tuple(Point(10 * number, value) for number, value in enumerate(perplexities, start=1))
    verdict = verdict_of(points, threshold=1.3, initial=300.0, tokens=1000 + duration, broken_steps=broken)
    return ProbeResult(Candidate(8, duration), verdict, points)


RESULTS = [
    result(10, 200.0, 100.0, 50.0),
    result(20, 200.0, 100.0, 150.0),
    result(30, 200.0, math.nan),
    result(40, 1e300),
    result(50, broken=(3,)),
]


def findings(*, results: list[ProbeResult], best: Candidate | None) -> Findings:
    full = 100_000 if best else None
    return Findings(
        results=results, settings=SETTINGS, vocab_size=300, best=best, notes=("take care",), full_tokens=full
    )


def test_the_page_names_every_probe_its_verdict_and_the_cost(tmp_path: Path) -> None:
    page = write_report(tmp_path, findings(results=RESULTS, best=Candidate(8, 10)))
    assert page == tmp_path / MARKDOWN
    text = page.read_text()
    assert "Found: start length s = 8, T = 10 steps." in text
    assert "5 probes trained 5,150 tokens, 5.15% of the tuned run's 100,000" in text
    assert "| 1 | 8 | 10 | no fluctuation (worst x0.67) | 1,010 |" in text
    assert "| 2 | 8 | 20 | fluctuated at step 30 (worst x1.50) | 1,020 |" in text
    assert "| 3 | 8 | 30 | fluctuated at step 20 (worst not finite) | 1,030 |" in text
    assert "| 5 | 8 | 50 | fluctuated at step 3 (worst not finite) | 1,050 |" in text
    assert "Note: take care." in text
    assert f"]({PICTURE})" in text
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("results", [RESULTS[:1], RESULTS[-1:], RESULTS[:2]])
def test_few_probes_and_nothing_found(tmp_path: Path, results: list[ProbeResult]) -> None:
    text = write_report(tmp_path, findings(results=results, best=None)).read_text()
    assert "Nothing was found." in text
    assert "% of" not in text


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / PICTURE).mkdir()
    with pytest.raises(UserError, match="--output"):
        write_report(tmp_path, findings(results=RESULTS, best=None))
