"""Trees of JSON values: how a later file or a ``--set`` changes an earlier one."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_ext.errors import UserError

Tree = dict[str, Any]
KeyPath = tuple[str | int, ...]

_DISCRIMINATOR = "pacing"
_UNITS = frozenset({"steps", "tokens"})


def merge(base: Tree, later: Tree) -> Tree:
    """``base`` changed by ``later``: objects merge key by key, everything else (lists too) is replaced.

    Two kinds of objects are replaced whole, because the keys of the old one mean nothing in the new one: a
    curriculum whose ``pacing`` changes, and a duration (``{"steps": n}`` or ``{"tokens": n}``).
    """
    merged = dict(base)
    for key, value in later.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _replaces(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def merge_all(trees: Iterable[Tree]) -> Tree:
    """All trees merged in order; the last one wins."""
    merged: Tree = {}
    for tree in trees:
        merged = merge(merged, tree)
    return merged


def _replaces(old: Tree, new: Tree) -> bool:
    if _DISCRIMINATOR in old and _DISCRIMINATOR in new:
        return bool(old[_DISCRIMINATOR] != new[_DISCRIMINATOR])
    return bool(old) and bool(new) and _UNITS.issuperset(old) and _UNITS.issuperset(new)


def parse_override(text: str) -> Tree:
    """``"a.b=value"`` as a tree ``{"a": {"b": value}}``; the value is JSON where it parses as JSON, else a string.

    Raises:
        UserError: there is no ``=``, or a part of the key is empty.
    """
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"--set {text!r} is not of the form section.key=value; for example --set training.seq_len=512")
    tree: Any = _parse_value(value)
    for part in reversed(parts):
        tree = {part: tree}
    return dict(tree)


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """All ``--set`` arguments as one tree, so that their order only matters where two of them name the same key."""
    return merge_all(parse_override(text) for text in overrides)


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def lookup(tree: Any, path: Sequence[str | int]) -> tuple[bool, Any]:
    """Whether ``path`` exists in ``tree``, and the value there (None where it does not exist)."""
    for part in path:
        in_object = isinstance(tree, dict) and part in tree
        in_list = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if not in_object and not in_list:
            return False, None
        tree = tree[part]
    return True, tree


def dotted(path: Sequence[str | int]) -> str:
    """A path as users write it: ``data.sources[0].prefix``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
