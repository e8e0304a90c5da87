"""Validation errors in our own words: the key, the value found, what is expected or meant, the file."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_ext.base import Section
from megatron_ext.config.deepspeed import refusal, refused_keys
from megatron_ext.config.foreign import hint_for, key_for, refused_setting, replacement
from megatron_ext.config.merging import ConfigLayer, KeyPath, Tree, dotted, lookup
from megatron_ext.errors import UserError

_MISSING: Final = {"missing", "union_tag_not_found"}
_SHOWN: Final = 80
_MOST: Final = 50
"""Problems that are told; each one is looked up in everything that a config may hold."""


class ConfigError(UserError):
    """A run config with problems; its message lists them, one line each, of very many the first ones."""

    def __init__(self, problems: Sequence[str], *, more: int = 0) -> None:
        self.problems = tuple(problems)
        count = len(self.problems) + more
        heading = [] if count == 1 else [f"{count:,} problems in the run config:"]
        rest = [f"and {more:,} more"] if more else []
        super().__init__("\n  ".join([*heading, *self.problems, *rest]))


def explain(error: ValidationError, *, root: type[Section], tree: Tree, layers: Sequence[ConfigLayer]) -> ConfigError:
    """All errors of ``error`` as one exception to raise.

    Args:
        error: what validating ``tree`` against ``root`` raised.
        root: the model that was validated.
        tree: the merged config.
        layers: where the config came from, the last one overriding; the last file names the config.
    """
    lines: list[str] = []
    for detail in error.errors(include_url=False)[:_MOST]:
        path = _key_path(detail["loc"], tree)
        source = _source(path, layers)
        lines.extend(f"{source}: {line}" for line in _describe(detail, path=path, root=root, tree=tree, source=source))
    return ConfigError(list(dict.fromkeys(lines)), more=max(0, error.error_count() - _MOST))


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


def _source(path: KeyPath, layers: Sequence[ConfigLayer]) -> str:
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
        return [f"{key} is {show(lookup(tree, path)[1])}: {message}"] if path else _contradictions(message, tree)
    if kind == "extra_forbidden":
        # A DeepSpeed config pasted at the top level instead of into its section.
        advice = replacement([str(path[0])], detail["input"]) if len(path) == 1 else None
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


def _contradictions(message: str, tree: Tree) -> list[str]:
    """The lines of what sections say against each other; after a refused key of DeepSpeed's, what to write instead."""
    block = tree.get("deepspeed", {})
    advice = {refusal(path): refused_setting(path, lookup(block, path)[1]) for path in refused_keys(block)}
    return [f"{line}: {advice[line]}" if line in advice else line for line in message.split("\n")]


def _expected(detail: ErrorDetails, *, path: KeyPath, root: type[Section], tree: Tree) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        field = field_at(root, path, tree)
        meaning = " ".join((field.description or "").replace("``", "").split()) if field else ""
        return f"it has no default. {meaning}".strip() if field else "the list is too short"
    if kind.startswith("union_tag"):
        pacings = ", ".join(_pacings_of(models_at(root, path[:-1], {})))
        return f"one of {pacings}" if kind == "union_tag_invalid" else f"write one of {pacings}"
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


Model = type[Section]


def sections_in(annotation: Any) -> list[Model]:
    """The section classes that a field's annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [model for argument in get_args(annotation) for model in sections_in(argument)]


def models_at(root: Model, path: Sequence[str | int], tree: Tree) -> list[Model]:
    """Section classes that may stand at ``path``; of several pacings, the one that ``tree`` chose."""
    models = [root]
    for depth, part in enumerate(path):
        if isinstance(part, int):
            continue
        models = [found for field in _fields_named(models, part) for found in sections_in(field.annotation)]
        value = lookup(tree, path[: depth + 1])[1]
        pacing = value.get("pacing") if isinstance(value, dict) else None
        models = [model for model in models if _fits(model, pacing)] or models
    return models


def field_at(root: Model, path: Sequence[str | int], tree: Tree) -> FieldInfo | None:
    """The field at ``path``, or None where the path ends in a list item or an unknown key."""
    if not path or isinstance(path[-1], int):
        return None
    fields = _fields_named(models_at(root, path[:-1], tree), path[-1])
    return fields[0] if fields else None


def _fields_named(models: Sequence[Model], name: str) -> list[FieldInfo]:
    return [model.model_fields[name] for model in models if name in model.model_fields]


def _fits(model: Model, pacing: Any) -> bool:
    field = model.model_fields.get("pacing")
    return pacing is None or field is None or pacing in get_args(field.annotation)


def _pacings_of(models: Sequence[Model]) -> list[str]:
    return [f'"{name}"' for model in models for name in get_args(model.model_fields["pacing"].annotation)]


def field_names(models: Sequence[Model]) -> list[str]:
    """All keys of the given sections, without repetition."""
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def all_keys(root: Model, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key below ``root`` outside of lists, sections included."""
    for name, field in root.model_fields.items():
        yield (*prefix, name)
        for model in sections_in(field.annotation):
            yield from all_keys(model, (*prefix, name))


def suggest(root: Model, path: KeyPath, tree: Tree) -> str:
    """What to write instead of the unknown key at ``path``: a key of this section, or one of another section."""
    *parents, last = path
    name, section = str(last), dotted(parents)
    siblings = field_names(models_at(root, parents, tree))
    close = get_close_matches(name.lower(), siblings, n=1, cutoff=0.75)
    alias = key_for(name)
    if alias and not (close and section):
        return f"write {alias} instead{hint_for(alias)}"
    if close:
        return f"did you mean {dotted((*parents, close[0]))}?"
    other_pacings = [model for model in models_at(root, parents, {}) if name in model.model_fields]
    if other_pacings:
        return f"only pacing {' or '.join(_pacings_of(other_pacings))} has this key"
    elsewhere = [key for key in all_keys(root) if key[-1] == name and "duration" not in key[:-1]]
    if elsewhere:
        return f"did you mean {dotted(elsewhere[0])}?"
    if alias:
        return f"write {alias} instead{hint_for(alias)}"
    return _nearest(root, name=name, siblings=siblings, section=section)


def _nearest(root: Model, *, name: str, siblings: Sequence[str], section: str) -> str:
    close = get_close_matches(name.lower(), siblings, n=1, cutoff=0.55)
    if close:
        return f"did you mean {dotted((section, close[0])) if section else close[0]}?"
    everywhere: dict[str, str] = {}
    for key in all_keys(root):
        everywhere.setdefault(str(key[-1]), dotted(key))
    close = get_close_matches(name.lower(), list(everywhere), n=1, cutoff=0.8)
    if close:
        return f"did you mean {everywhere[close[0]]}?"
    return f"the keys of {section or 'a run config'} are {', '.join(siblings)}"
