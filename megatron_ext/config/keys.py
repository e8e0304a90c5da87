"""Which keys a config section has: read off the section models, for messages and suggestions."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic.fields import FieldInfo

from megatron_ext.base import Section
from megatron_ext.config.aliases import hint_for, key_for
from megatron_ext.config.merging import KeyPath, Tree, dotted, lookup

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


def _pacings_of(models: Sequence[Model]) -> str:
    names = [name for model in models for name in get_args(model.model_fields["pacing"].annotation)]
    return " or ".join(f'"{name}"' for name in names)


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
        return f"only pacing {_pacings_of(other_pacings)} has this key"
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
