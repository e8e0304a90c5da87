"""Reading config files: JSON errors, extends, presets."""

from pathlib import Path

import pytest

from megatron_ext.config.loading import parse_json, preset_names, read_layers
from megatron_ext.config.merging import merge_all
from megatron_ext.errors import UserError
from tests.config.builders import write


def merged(path: Path) -> dict[str, object]:
    return merge_all(layer.tree for layer in read_layers(path))


def test_later_files_win_and_the_file_itself_wins_over_all(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "a.json", {"seed": 1, "name": "a", "model": {"num_layers": 1, "hidden_size": 1}})
    write(tmp_path / "parts" / "b.json", {"seed": 2, "model": {"num_layers": 2}})
    main = write(tmp_path / "main.json", {"extends": ["parts/a.json", "parts/b.json"], "model": {"vocab_size": 3}})
    assert merged(main) == {
        "seed": 2,
        "name": "a",
        "model": {"num_layers": 2, "hidden_size": 1, "vocab_size": 3},
    }


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "root.json", {"seed": 5})
    write(tmp_path / "deep" / "middle.json", {"extends": "../root.json"})
    main = write(tmp_path / "deep" / "deeper" / "main.json", {"extends": "../middle.json"})
    monkeypatch.chdir(tmp_path / "deep")
    assert merged(main) == {"seed": 5}
    assert merged(Path("deeper/main.json")) == {"seed": 5}


def test_one_file_may_be_reached_on_two_ways(tmp_path: Path) -> None:
    write(tmp_path / "root.json", {"seed": 5})
    write(tmp_path / "a.json", {"extends": "root.json", "name": "a"})
    write(tmp_path / "b.json", {"extends": "root.json", "name": "b"})
    assert merged(write(tmp_path / "main.json", {"extends": ["a.json", "b.json"]})) == {"seed": 5, "name": "b"}


def test_a_circle_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"extends": "b.json"})
    write(tmp_path / "b.json", {"extends": "c.json"})
    write(tmp_path / "c.json", {"extends": "b.json"})
    with pytest.raises(UserError) as caught:
        read_layers(tmp_path / "a.json")
    message = str(caught.value)
    assert "circle" in message
    assert message.count("b.json") == 2
    assert "a.json" not in message


def test_a_preset_fills_the_model(tmp_path: Path) -> None:
    main = write(tmp_path / "main.json", {"extends": "preset:gpt2-117m", "model": {"hidden_dropout": 0.0}})
    model = merged(main)["model"]
    assert isinstance(model, dict)
    assert (model["num_layers"], model["hidden_size"], model["hidden_dropout"]) == (12, 768, 0.0)


def test_an_unknown_preset_names_the_known_ones(tmp_path: Path) -> None:
    main = write(tmp_path / "main.json", {"extends": "preset:gpt2-117M"})
    with pytest.raises(UserError, match=r"no preset 'gpt2-117M'; did you mean preset:gpt2-117m\? .*gpt3-175b"):
        read_layers(main)


@pytest.mark.parametrize("value", [3, None, [1], [""], {"file": "a.json"}])
def test_extends_of_the_wrong_type_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UserError, match=r"extends is .*: expected a file name"):
        read_layers(write(tmp_path / "main.json", {"extends": value}))


def test_a_missing_file_says_who_named_it(tmp_path: Path) -> None:
    main = write(tmp_path / "main.json", {"extends": "base_config.json"})
    write(tmp_path / "base_confg.json", {})
    with pytest.raises(
        UserError, match=r'base_config\.json does not exist \(named by "extends" in .*main\.json\)'
    ) as caught:
        read_layers(main)
    assert "did you mean" in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere\.json does not exist; check the path"):
        read_layers(tmp_path / "nowhere.json")


def test_a_directory_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        read_layers(tmp_path)
    binary = tmp_path / "main.json"
    binary.write_bytes(b'{"name": "\xff\xfe"}')
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 10\)"):
        read_layers(binary)


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "b.json")
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_layers(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_layers(write(tmp_path / "main.json", {"extends": "a\0.json"}))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "main.json"
    path.write_bytes(b'\xef\xbb\xbf{"seed": 1}')
    assert merged(path) == {"seed": 1}


@pytest.mark.parametrize(
    ("text", "line", "column", "hint"),
    [
        ('{\n "seed": 1,\n}', 3, 1, "remove the comma before '}'"),
        ('{\n "seed": 1 // fixed\n}', 2, 12, "JSON has no comments"),
        ('{"seed" 1}', 1, 9, "expecting ':' delimiter"),
        ('{"seed": 1', 1, 11, "the file ends too early"),
        ("", 1, 1, "the file is empty"),
        ("{'seed': 1}", 1, 2, "double quotes"),
        ('{"a": 1} {"b": 2}', 1, 10, "extra data"),
    ],
)
def test_a_syntax_error_names_file_line_and_column(text: str, line: int, column: int, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_json(text, source="run.json")
    message = str(caught.value)
    assert message.startswith(f"run.json:{line}:{column}: ")
    assert f"line {line}, column {column}" in message
    assert hint in message


def test_a_key_written_twice_is_refused_with_its_path() -> None:
    with pytest.raises(UserError, match=r"^run\.json: data\.sources\[1\]\.prefix is written twice"):
        parse_json('{"data": {"sources": [{}, {"prefix": "a", "prefix": "a"}]}}', source="run.json")
    with pytest.raises(UserError, match="written twice"):
        parse_json('{"": 1, "": 2}', source="run.json")


def test_comments_and_schema_references_are_dropped() -> None:
    text = '{"$schema": "s", "$comment": "one", "model": {"$comment": "two", "$comment": "three", "num_layers": 2}}'
    assert parse_json(text, source="run.json") == {"model": {"num_layers": 2}}


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"a"', "true"])
def test_only_an_object_is_a_config(text: str) -> None:
    with pytest.raises(UserError, match="expected a JSON object"):
        parse_json(text, source="run.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_lacks_are_refused(number: str) -> None:
    with pytest.raises(UserError, match=f"run.json: {number} is not a number"):
        parse_json(f'{{"seed": {number}}}', source="run.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": ' + "1" * 5000 + "}"])
def test_monstrous_files_are_refused_without_a_traceback(text: str) -> None:
    with pytest.raises(UserError, match=r"run\.json: "):
        parse_json(text, source="run.json")


def test_every_size_of_both_families_is_a_preset() -> None:
    gpt2 = {f"gpt2-{size}" for size in ("117m", "345m", "774m", "1.5b")}
    gpt3 = {f"gpt3-{size}" for size in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b")}
    assert set(preset_names()) == gpt2 | gpt3
