"""The JSON Schema says what loading accepts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.loading import parse_json
from megatron_ext.config.run import RunConfig
from megatron_ext.config.schema import reference, run_schema
from tests.config.test_recipes import CONFIGS, RUN_CONFIGS


def objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if node.get("type") == "object" and "properties" in node:
            yield node
        for value in node.values():
            yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


def test_every_key_has_a_description() -> None:
    for section in objects(run_schema()):
        for key, schema in section["properties"].items():
            if key not in {"$schema"}:
                assert schema.get("description"), f"{section.get('title')}.{key}"
                assert "``" not in schema["description"]
                assert "\n" not in schema["description"]


def test_every_section_is_closed_but_takes_comments() -> None:
    for section in objects(run_schema()):
        assert section["additionalProperties"] is False
        assert "$comment" in section["properties"]


def test_the_top_level_has_every_section() -> None:
    keys = set(run_schema()["properties"])
    assert keys == {*RunConfig.model_fields, "$schema", "$comment", "extends"}
    assert set(run_schema()["required"]) == {"model", "data", "training", "learning_rate"}
    assert "required" not in run_schema(partial=True)


def test_a_schema_is_made_anew_each_time() -> None:
    run_schema()["properties"].clear()
    assert run_schema()["properties"]


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_keys_of_the_recipes_are_in_the_schema(path: Path) -> None:
    schema = run_schema(partial=True)

    def check(tree: dict[str, Any], node: dict[str, Any]) -> None:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        options = node.get("anyOf") or node.get("oneOf")
        if options:
            fitting = [option for option in map(resolve, options) if set(tree) <= set(option.get("properties", {}))]
            assert fitting, tree
            node = fitting[0]
        for key, value in tree.items():
            assert key in node["properties"]
            if isinstance(value, dict):
                check(value, node["properties"][key])

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node

    check(parse_json(path.read_text(encoding="utf-8"), source=str(path)), schema)


PAGE = CONFIGS.parent / "docs" / "config.md"


def test_the_page_of_all_keys_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "docs/config.md is not what the sections say: run `megatron-ext schema --markdown > docs/config.md`"
    )


def test_the_page_has_every_key_with_its_description_and_every_link_a_heading() -> None:
    page = reference()
    for section in objects(RunConfig.model_json_schema()):
        for key, schema in section["properties"].items():
            if section["title"] != "Duration":
                assert f"| `{key}` | " in page
                assert " ".join(schema["description"].replace("``", "`").replace("|", "\\|").split()) in page
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    assert len(set(headings)) == len(headings)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= anchors
