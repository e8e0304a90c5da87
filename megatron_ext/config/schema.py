"""What a run config may hold, written down for others: a JSON Schema for editors, docs/config.md for people.

Both are made from the section models alone: keys, types, bounds and defaults from their fields, the words from their
docstrings.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from megatron_ext.base import MAX_COUNT
from megatron_ext.config.deepspeed import PARTLY_PASSED, PASSED
from megatron_ext.config.loading import preset_names
from megatron_ext.config.run import RunConfig

_TEXT: Final = {"type": "string", "description": "A remark; ignored."}
_EXTENDS: Final = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Files (relative to this one) or preset:NAME that this config changes; later ones win.",
}

_TYPES: Final = {"integer": "whole number", "boolean": "`true`, `false`", "null": "`null`"}
_BOUNDS: Final = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}

_INTRODUCTION: Final = """\
# Run config

<!-- Generated: megatron-ext schema --markdown > docs/config.md -->

A run is one JSON file. `megatron-ext validate FILE` checks it, `megatron-ext schema` prints a JSON Schema for editors.

    {
      "extends": "preset:gpt2-117m",
      "data": {"sources": [{"prefix": "data/corpus"}]},
      "training": {"seq_len": 1024, "batch_size": 512, "duration": {"tokens": 157286400000}},
      "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 20000}},
      "learning_rate": {"peak": 0.0006, "warmup": {"steps": 3000}}
    }

**Combining.** `extends` names a file (relative to this one), a preset, or a list of them. Objects merge key by key, and
the later one wins: files in their order, then this file, then each `--set section.key=value` of the command line. Lists
are replaced, and so are durations and a `curriculum` with another `pacing`. `$comment` may stand in every object.

**Presets** of model sizes: PRESETS.

**Durations** are `{"steps": n}` (optimizer steps) or `{"tokens": n}` (tokens trained on, at the lengths really used),
exactly one of the two.

"""


def run_schema(*, partial: bool = False) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config file; ``partial``: of one that extends others and may lack keys."""
    schema = _adapt(RunConfig.model_json_schema(), partial=partial)
    schema["properties"] = {"$schema": {"type": "string"}, "extends": _EXTENDS, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _adapt(node: Any, *, partial: bool) -> Any:
    if isinstance(node, list):
        return [_adapt(item, partial=partial) for item in node]
    if not isinstance(node, dict):
        return node
    adapted = {key: _adapt(value, partial=partial) for key, value in node.items()}
    if isinstance(node.get("description"), str):
        adapted["description"] = " ".join(node["description"].replace("``", "`").split())
    if "properties" not in node or node.get("type") != "object":
        return adapted
    if partial:
        adapted.pop("required", None)
    return {**adapted, "properties": {**adapted["properties"], "$comment": _TEXT}}


def reference() -> str:
    """The page docs/config.md: every section's keys with values, defaults and meaning (Markdown)."""
    schema = _adapt(RunConfig.model_json_schema(), partial=False)
    sections: dict[str, Any] = {}
    _collect("", schema, definitions=schema.pop("$defs"), sections=sections)
    titles = {node["title"]: title for title, node in sections.items()}
    page = _INTRODUCTION.replace("PRESETS", _codes(f"preset:{name}" for name in preset_names()))
    page += "\n".join(line for title, node in sections.items() for line in _section(title, node, titles=titles))
    inside = "; ".join(f"of `{key}` {_codes(refused)}" for key, refused in PARTLY_PASSED.items())
    return (
        f"{page}\n## deepspeed\n\nThese keys of a DeepSpeed config pass: {_codes(PASSED | PARTLY_PASSED.keys())}.\n\n"
        f"What other sections decide, or DeepSpeed no longer has, does not: {inside}.\n"
    )


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _collect(title: str, node: dict[str, Any], *, definitions: dict[str, Any], sections: dict[str, Any]) -> None:
    """Put ``node`` and every object below it into ``sections``, each once, under the path that leads to it."""
    sections[title] = node
    for key, value in node.get("properties", {}).items():
        path = f"{title.partition(',')[0]}.{key}".removeprefix(".")
        if "oneOf" in value:
            sections[path] = value
        for name, step in _objects(value):
            definition = definitions[name]
            pacing = definition["properties"].get("pacing")
            below = f"{path}, {json.dumps(pacing['const'])}" if pacing else path + step
            if not any(found is definition for found in sections.values()):
                _collect(below, definition, definitions=definitions, sections=sections)


def _objects(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of the objects that a value may be, and ``[]`` for those it may be a list of; durations are no objects."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        if name != "Duration":
            yield name, ""
    for part in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _objects(part)
    if "items" in node:
        yield from ((name, "[]") for name, _ in _objects(node["items"]))


def _section(title: str, node: dict[str, Any], *, titles: dict[str, str]) -> Iterator[str]:
    if title:
        yield f"{'##' if re.fullmatch(r'[a-z_]+', title) else '###'} {title}\n\n{node['description']}\n"
    if "oneOf" in node:
        choices = ", ".join(_value(choice, titles) for choice in node["oneOf"])
        yield f"`{node['discriminator']['propertyName']}` chooses one of: {choices}.\n"
        return
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    required = node.get("required", ())
    # What chooses a section comes first; fields of base classes would.
    for key, field in sorted(node["properties"].items(), key=lambda item: "const" not in item[1]):
        if key != "$comment":
            below = not title and ("oneOf" in field or field.get("type") == "object")
            value = _link(key) if below else _value(field, titles)
            default = "**required**" if key in required else _default(field)
            cells = (f"`{key}`", value, default, field["description"])
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _default(field: dict[str, Any]) -> str:
    """The default; of a section those of its keys, which its own table has."""
    value = field.get("default", {})
    return "" if isinstance(value, dict) else f"`{json.dumps(value)}`"


def _value(node: dict[str, Any], titles: dict[str, str]) -> str:
    """What may be written, in words: type and bounds, or a link to the section that it is."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return "duration" if name == "Duration" else _link(titles[name])
    if "anyOf" in node:
        return " or ".join(_value(choice, titles) for choice in node["anyOf"])
    if "const" in node or "enum" in node:
        return ", ".join(f"`{json.dumps(value)}`" for value in node.get("enum") or [node["const"]])
    if node["type"] == "array":
        least = f" of at least {node['minItems']}" if "minItems" in node else ""
        count = f" of {len(node['prefixItems'])}" if "prefixItems" in node else least
        return f"list{count}: {_value(node.get('items') or node['prefixItems'][0], titles)}"
    bounds = [f"{word} {node[key]:,}" for key, word in _BOUNDS.items() if node.get(key, MAX_COUNT) != MAX_COUNT]
    return " ".join([_TYPES.get(node["type"], node["type"]), ", ".join(bounds)]).strip()


def _link(title: str) -> str:
    """A link to a heading of the page, whose name is what GitHub makes of it."""
    return f"[{title}](#{re.sub(r'[^a-z0-9_ -]', '', title.lower()).replace(' ', '-')})"
