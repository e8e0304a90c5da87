"""Laws of merging trees and of --set."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.loading import parse_overrides
from megatron_ext.config.merging import dotted, lookup, merge, merge_all
from megatron_ext.errors import UserError

keys = st.sampled_from(["a", "b", "c", "name", "size"])
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
trees = st.recursive(
    st.dictionaries(keys, leaves, max_size=4), lambda inner: st.dictionaries(keys, leaves | inner, max_size=4)
)


@st.composite
def same_shaped(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Three trees in which a path that is a section in one is a section wherever it occurs, as a schema makes it."""
    sections = st.dictionaries(keys, leaves, max_size=4)
    tree = st.dictionaries(st.sampled_from(["s1", "s2"]), sections)
    return draw(st.lists(tree, min_size=3, max_size=3))


def leaf_paths(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    paths = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            paths.extend(leaf_paths(value, (*prefix, key)))
        elif not isinstance(value, dict):
            paths.append((*prefix, key))
    return paths


@given(trees)
def test_the_empty_tree_changes_nothing(tree: dict[str, Any]) -> None:
    assert merge(tree, {}) == merge({}, tree) == merge(tree, tree) == tree


@given(trees, trees)
def test_every_later_value_wins_and_no_other_key_appears(base: dict[str, Any], later: dict[str, Any]) -> None:
    merged = merge(base, later)
    for path in leaf_paths(later):
        assert lookup(merged, path) == lookup(later, path)
    for path in leaf_paths(merged):
        assert lookup(merged, path) in (lookup(base, path), lookup(later, path))


@given(trees, trees)
def test_merging_leaves_its_arguments_alone(base: dict[str, Any], later: dict[str, Any]) -> None:
    before = json.dumps([base, later])
    merge(base, later)
    assert json.dumps([base, later]) == before


@given(same_shaped())
def test_merging_is_associative_where_sections_stay_sections(three: list[dict[str, Any]]) -> None:
    first, second, third = three
    assert merge(merge(first, second), third) == merge(first, merge(second, third)) == merge_all(three)


@given(st.lists(keys, min_size=1, max_size=4), leaves)
def test_an_override_sets_exactly_its_key(path: list[str], value: Any) -> None:
    tree = parse_overrides([f"{'.'.join(path)}={json.dumps(value)}"])
    assert lookup(tree, path) == (True, value)
    assert leaf_paths(tree) == [tuple(path)]


@given(st.permutations(["a.b=1", "a.c=2", "d=x", "e.f.g=[1, 2]"]))
def test_the_order_of_overrides_of_different_keys_does_not_matter(overrides: list[str]) -> None:
    assert parse_overrides(overrides) == {"a": {"b": 1, "c": 2}, "d": "x", "e": {"f": {"g": [1, 2]}}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=1", 1),
        ("k=1e-3", 0.001),
        ("k=true", True),
        ("k=null", None),
        ("k=bf16", "bf16"),
        ("k=", ""),
        ("k=a=b", "a=b"),
    ],
)
def test_values_are_json_or_else_text(text: str, value: Any) -> None:
    assert parse_overrides([text]) == {"k": value}


@pytest.mark.parametrize("text", ["", "seed", "=3", "a..b=3", ".a=1", "a.=1"])
def test_an_override_that_names_no_key_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--set .* is not of the form section\.key=value"):
        parse_overrides([text])


LINEAR = {"pacing": "linear", "start": 8, "duration": {"steps": 3}}


@pytest.mark.parametrize(
    ("base", "later", "merged"),
    [
        # A curriculum with another pacing and a duration in another unit are replaced, and so are lists.
        ({"c": LINEAR}, {"c": {"pacing": "constant"}}, {"c": {"pacing": "constant"}}),
        ({"c": LINEAR}, {"c": {"pacing": "linear", "start": 16}}, {"c": {**LINEAR, "start": 16}}),
        ({"c": LINEAR}, {"c": {"start": 16}}, {"c": {**LINEAR, "start": 16}}),
        ({"d": {"tokens": 5}, "n": 8}, {"d": {"steps": 3}}, {"d": {"steps": 3}, "n": 8}),
        ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
    ],
)
def test_what_is_replaced_whole(base: dict[str, Any], later: dict[str, Any], merged: dict[str, Any]) -> None:
    assert merge(base, later) == merged


def test_dotted_paths_read_as_they_are_written() -> None:
    assert dotted(("data", "sources", 0, "prefix")) == "data.sources[0].prefix"
    assert dotted(("data", "a\nb")) == r'data."a\nb"'
