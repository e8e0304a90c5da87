"""JSON Schema of a run config, for editors and for other programs that write configs."""

from typing import Any

from megatron_ext.config.run import RunConfig

_TEXT = {"type": "string", "description": "A remark; ignored."}
_EXTENDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Files (relative to this one) or preset:NAME that this config changes; later ones win.",
}


def run_schema(*, partial: bool = False) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config file, with the sections' docstrings as descriptions.

    Args:
        partial: leave out which keys are required: for files that extend others.
    """
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
