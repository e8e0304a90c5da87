"""The comparison table: its numbers worked out by hand."""

import math

import numpy as np
import pytest

from megatron_ext.analysis.comparison import Comparison, compare, result_of
from tests.analysis.runs import run_data


def cells(comparison: Comparison, row: int) -> dict[str, str]:
    return dict(zip(comparison.headings, comparison.rows[row], strict=True))


def test_a_runs_result_is_read_off_its_columns() -> None:
    ratio = np.ones(50)
    ratio[[3, 4, 5, 6, 7]] = [1.1, 1.11, 1.3, 1.6, 2.5]
    loss = np.full(50, 3.0)
    loss[[10, 11]] = [np.nan, np.inf]
    run = run_data("a", loss=loss, loss_ratio=ratio, valid={10: 4.0, 20: 3.0, 30: 2.5, 40: math.nan, 50: 2.75})
    result = result_of(run, 3.0)
    assert (result.steps, result.tokens, result.seconds) == (50, 3200.0, 25.0)
    assert (result.final_loss, result.best_loss) == (2.75, 2.5)
    assert (result.tokens_to_target, result.seconds_to_target) == (20 * 64, 10.0)
    assert result.above == (4, 3, 2, 1)
    assert result.largest_ratio == 2.5
    assert result.non_finite == 2


def test_the_first_run_sets_the_target_and_the_pace() -> None:
    slow = run_data("slow", valid={20: 4.0, 40: 3.0})
    fast = run_data("fast", valid={10: 3.0, 40: 2.0}, seconds=np.arange(1, 51) * 0.25)
    never = run_data("never", valid={40: 3.5})
    comparison = compare([slow, fast, never])
    assert comparison.target == 3.0
    assert cells(comparison, 0)["token speedup"] == "1.00x"
    row = cells(comparison, 1)
    assert (row["tokens to target"], row["token speedup"]) == ("640", "4.00x")
    # At the validation after step 10 the helper's clock stands at 5 s, against 20 s.
    assert (row["time to target"], row["time speedup"]) == ("5.0 s", "4.00x")
    row = cells(comparison, 2)
    assert (row["tokens to target"], row["token speedup"]) == ("not reached", "-")


def test_a_given_target_counts_for_all() -> None:
    comparison = compare([run_data("a", valid={20: 4.0, 40: 3.0}), run_data("b", valid={10: 4.5})], target=4.0)
    assert cells(comparison, 0)["tokens to target"] == "1,280"
    assert cells(comparison, 1)["tokens to target"] == "not reached"
    assert "4.0000, as asked for" in comparison.markdown()


def test_seeds_are_means_with_their_spread() -> None:
    runs = [
        run_data("a1", group="a", valid={40: 3.0}),
        run_data("b1", group="b", valid={20: 2.9}, loss_ratio=np.full(50, 1.3)),
        run_data("a2", group="a", valid={40: 2.0}),
        run_data("b2", group="b", valid={10: 2.4, 20: 2.1}),
        run_data("c1", group="c", valid={40: 2.4}),
        run_data("c2", group="c", valid={40: 2.6}),
    ]
    comparison = compare(runs)
    assert comparison.target == 3.0
    assert "3.0000, the highest final one of a (2 seeds)" in comparison.markdown()
    assert [row[0] for row in comparison.rows] == ["a (2 seeds)", "b (2 seeds)", "c (2 seeds)"]
    assert cells(comparison, 0)["final val loss"] == "2.5000 ± 0.7071"
    assert cells(comparison, 0)["tokens to target"] == "2,560"
    assert cells(comparison, 1)["tokens to target"] == "960 ± 452.5"
    assert cells(comparison, 1)["token speedup"] == "2.67x"
    assert cells(compare(runs, target=2.5), 0)["tokens to target"] == "1 of 2 seeds"
    assert cells(compare(runs, target=2.5), 1)["token speedup"] == "-"
    assert cells(comparison, 1)["ratio > 1.2"] == "25 ± 35.4"
    assert cells(comparison, 2)["steps"] == "50"
    assert "standard deviation" in comparison.markdown()
    assert "seeds" not in compare(runs[:1]).markdown()


def test_a_seed_that_diverged_sets_no_target() -> None:
    runs = [run_data(f"a{seed}", group="a", valid={40: loss}) for seed, loss in enumerate((math.nan, 3.0, math.inf))]
    assert compare(runs).target == 3.0
    assert cells(compare(runs), 0)["tokens to target"] == "1 of 3 seeds"


@pytest.mark.parametrize("valid", [{}, {10: math.nan}, {10: math.inf}])
def test_without_a_finite_validation_nothing_is_invented(valid: dict[int, float]) -> None:
    row = cells(compare([run_data("a", valid=valid)]), 0)
    assert (row["best val loss"], row["token speedup"]) == ("-", "-")
    assert row["final val loss"] in {"-", "inf"}


def test_markdown_is_a_table_whatever_the_names_are() -> None:
    text = compare([run_data("a|b", valid={10: 3.0})]).markdown()
    head, rule, row = text.splitlines()[:3]
    assert row.startswith("| a\\|b | 50 | 3,200 | 25.0 s | 3.0000 |")
    assert head.count("|") == rule.count("|") == row.count("|") - 1
