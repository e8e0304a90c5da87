"""Trees of JSON values: how a later one changes an earlier one, and what is at a key."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

Tree = dict[str, Any]
KeyPath = tuple[str | int, ...]

_DISCRIMINATOR = "pacing"
_UNITS = frozenset({"steps", "tokens"})


@dataclass(frozen=True)
class ConfigLayer:
    """What one file (or the command line) says, and the name under which a message refers to it."""

    source: str
    tree: Tree


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
    return reduce(merge, trees, {})


def _replaces(old: Tree, new: Tree) -> bool:
    if _DISCRIMINATOR in old and _DISCRIMINATOR in new:
        return bool(old[_DISCRIMINATOR] != new[_DISCRIMINATOR])
    return bool(old) and bool(new) and _UNITS.issuperset(old) and _UNITS.issuperset(new)


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
    """A path as users write it, ``data.sources[0].prefix``; what cannot be printed is escaped as in JSON."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in path).removeprefix(".")


def _printable(key: str) -> str:
    return key if key.isprintable() else json.dumps(key)
