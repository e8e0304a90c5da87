"""Validation errors in our own words: the key, the value found, what is expected, the file."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_ext.base import Section
from megatron_ext.config.deepspeed_passthrough import replacement
from megatron_ext.config.files import Layer
from megatron_ext.config.keys import field_at, suggest
from megatron_ext.config.merging import KeyPath, Tree, dotted, lookup
from megatron_ext.curriculum.pacings import PACINGS
from megatron_ext.errors import UserError

_MISSING: Final = {"missing", "union_tag_not_found"}
_PACINGS: Final = ", ".join(f'"{name}"' for name in PACINGS)
_SHOWN: Final = 80


class ConfigError(UserError):
    """A run config with problems; its message lists all of them, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        single = len(self.problems) == 1
        heading = [] if single else [f"{len(self.problems)} problems in the run config:"]
        super().__init__("\n  ".join([*heading, *self.problems]))


def explain(error: ValidationError, *, root: type[Section], tree: Tree, layers: Sequence[Layer]) -> ConfigError:
    """All errors of ``error`` as one exception to raise.

    Args:
        error: what validating ``tree`` against ``root`` raised.
        root: the model that was validated.
        tree: the merged config.
        layers: where the config came from, the last one overriding; the last file names the config.
    """
    lines: list[str] = []
    for detail in error.errors(include_url=False):
        path = _key_path(detail["loc"], tree)
        source = _source(path, layers)
        lines.extend(f"{source}: {line}" for line in _describe(detail, path=path, root=root, tree=tree, source=source))
    return ConfigError(list(dict.fromkeys(lines)))


def show(value: Any) -> str:
    """A value as the JSON file has it, cut short where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _key_path(loc: Sequence[str | int], tree: Tree) -> KeyPath:
    """``loc`` without the tags that a discriminated union puts into it."""
    path: list[str | int] = []
    tagged = False
    for part in loc:
        value = lookup(tree, path)[1]
        if isinstance(value, dict) and value.get("pacing") == part and not tagged:
            tagged = True
            continue
        tagged = False
        path.append(part)
    return tuple(path)


def _source(path: KeyPath, layers: Sequence[Layer]) -> str:
    """The last layer that says something about ``path``, or else about the section it is in."""
    for end in range(len(path), 0, -1):
        for layer in reversed(layers):
            if lookup(layer.tree, path[:end])[0]:
                return layer.source
    return next((layer.source for layer in reversed(layers) if layer.source != "--set"), "run config")


def _describe(detail: ErrorDetails, *, path: KeyPath, root: type[Section], tree: Tree, source: str) -> list[str]:
    kind, key = detail["type"], dotted(path)
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        found = lookup(tree, path)[1]
        return [f"{key} is {show(found)}: {message}"] if path else message.splitlines()
    if kind == "extra_forbidden":
        # A DeepSpeed config pasted at the top level instead of into its section.
        advice = replacement(str(path[0]), detail["input"]) if len(path) == 1 else None
        if advice is not None:
            return [f"{key}: unknown key; {advice}"]
        return [f"{key}: unknown key; {suggest(root, path, tree)}"]
    if kind.startswith("union_tag"):
        path, key = (*path, "pacing"), f"{key}.pacing"
    expected = _expected(detail, path=path, root=root, tree=tree)
    if kind in _MISSING:
        return [f"{key} is missing; {expected}"]
    exists, found = lookup(tree, path)
    value = found if exists else detail["input"]
    return [f"{key} is {show(value)}: expected {expected}{_fix(kind, value, source=source, key=key)}"]


def _expected(detail: ErrorDetails, *, path: KeyPath, root: type[Section], tree: Tree) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        field = field_at(root, path, tree)
        meaning = " ".join((field.description or "").replace("``", "").split()) if field else ""
        return f"it has no default. {meaning}".strip() if field else "the list is too short"
    if kind == "union_tag_not_found":
        return f"write one of {_PACINGS}"
    if kind == "union_tag_invalid":
        return f"one of {_PACINGS}"
    words = _EXPECTED.get(kind)
    if words is None:
        return "another kind of value; see the JSON Schema that `megatron-ext schema` prints"
    return words(context)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _items(context: Mapping[str, Any], key: str) -> str:
    count = context[key]
    return f"{count} item" if count == 1 else f"{count} items"


_EXPECTED: Final[dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "int_type": lambda _: "a whole number",
    "int_from_float": lambda _: "a whole number",
    "int_parsing_size": lambda _: "a smaller whole number",
    "float_type": lambda _: "a number",
    "bool_type": lambda _: "true or false",
    "string_type": lambda _: "a string in double quotes",
    "model_type": lambda _: "an object, {...}",
    "model_attributes_type": lambda _: "an object, {...}",
    "dict_type": lambda _: "an object, {...}",
    "tuple_type": lambda _: "a list, [...]",
    "literal_error": lambda context: f"one of {context['expected'].replace(chr(39), chr(34)).replace(' or ', ', ')}",
    "greater_than": lambda context: f"more than {_number(context['gt'])}",
    "greater_than_equal": lambda context: f"at least {_number(context['ge'])}",
    "less_than": lambda context: f"less than {_number(context['lt'])}",
    "less_than_equal": lambda context: f"at most {_number(context['le'])}",
    "finite_number": lambda _: "a finite number",
    "too_short": lambda context: f"at least {_items(context, 'min_length')}",
    "too_long": lambda context: f"at most {_items(context, 'max_length')}",
}


def _fix(kind: str, value: Any, *, source: str, key: str) -> str:
    """`` , write ...`` where the mistake is one of spelling."""
    if kind in {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind in {"int_type", "float_type"} and isinstance(value, str) and _is_number(value):
        return f"; write {value.strip()} without quotes"
    if kind == "string_type" and source == "--set" and not isinstance(value, dict | list):
        return f"; write --set '{key}=\"{json.dumps(value)}\"'"
    if kind == "model_type" and key.rpartition(".")[2] in {"duration", "warmup", "cooldown", "every", "decay_duration"}:
        return '; a duration is {"steps": n} or {"tokens": n}'
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
