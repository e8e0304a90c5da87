"""Configs from anywhere: bounded work, names inside of output_dir, and no orders to the terminal."""

import json
import os
import re
from pathlib import Path

import pytest

from megatron_ext.config.loading import load_config, read_layers
from megatron_ext.config.resolved import read_config
from megatron_ext.errors import UserError
from tests.config.builders import small_tree, write
from tests.config.test_loading import problems_of


def test_a_file_that_is_reached_twice_is_read_once_and_counts_where_it_comes_last(tmp_path: Path) -> None:
    write(tmp_path / "base.json", small_tree(training={"batch_size": 2}))
    write(tmp_path / "a.json", {"extends": "base.json", "training": {"batch_size": 3}, "seed": 5})
    write(tmp_path / "b.json", {"extends": "./base.json", "name": "b"})
    layers = read_layers(write(tmp_path / "run.json", {"extends": ["a.json", "b.json"]}))
    assert [Path(layer.source).name for layer in layers] == ["a.json", "base.json", "b.json", "run.json"]
    config = load_config(tmp_path / "run.json")
    assert (config.training.batch_size, config.seed, config.name) == (2, 5, "b")


def test_forty_diamonds_cost_forty_reads(tmp_path: Path) -> None:
    write(tmp_path / "l0.json", small_tree())
    for level in range(1, 41):
        write(tmp_path / f"l{level}.json", {"extends": [f"l{level - 1}.json", f"./l{level - 1}.json"]})
    assert len(read_layers(tmp_path / "l40.json")) == 41


def test_no_more_files_than_anybody_writes(tmp_path: Path) -> None:
    write(tmp_path / "l0.json", small_tree())
    for level in range(1, 300):
        write(tmp_path / f"l{level}.json", {"extends": f"l{level - 1}.json"})
    assert load_config(tmp_path / "l199.json")
    with pytest.raises(UserError, match="leads to more than 200 files"):
        load_config(tmp_path / "l299.json")


@pytest.mark.parametrize("kind", ["pipe", "device", "long"])
@pytest.mark.parametrize("extended", [True, False])
def test_a_config_is_a_regular_file_of_some_length(tmp_path: Path, kind: str, extended: bool) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "long":
        path.write_text("[" + "1," * (3 << 20) + "1]")
    named = write(tmp_path / "run.json", {**small_tree(), "extends": str(path)}) if extended else path
    expected = "longer than 4 MiB" if kind == "long" else "it is no regular file"
    with pytest.raises(UserError, match=rf"config file {path} cannot be read.*{expected}"):
        load_config(named)
    with pytest.raises(UserError, match=rf"config file {path} cannot be read.*{expected}"):
        read_config(named)


@pytest.mark.parametrize(
    "text", ["root:x:0:0:root", "SECRET=5", '"SECRET"', '{"name": root:x', "[SECRET", "{SECRET: 1}"]
)
def test_what_is_no_config_is_not_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path / "run.json", {**small_tree(), "extends": "secret"}))
    assert "secret" in str(caught.value)
    assert not re.search("root|SECRET", str(caught.value).replace(str(tmp_path), ""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"name":' + "[" * 70 + "]" * 70 + "}", "nested too deeply"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested too deeply"),
        ('{"seed":' + "1" * 5000 + "}", "Exceeds the limit"),
        ('{"seed":' + "1" * 400 + ',"training": 1e9999}', "training is Infinity: expected an object"),
        (json.dumps({f"k{i}": 1 for i in range(3000)}), "and 2,95"),
    ],
)
def test_json_of_any_depth_number_and_length_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "run.json")
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    "override", ["a" + ".a" * 20_000 + "=1", "seed=" + "[" * 50_000, "seed=" + "[" * 99 + "]" * 99]
)
def test_overrides_of_any_depth_are_one_message(tmp_path: Path, override: str) -> None:
    message = problems_of(tmp_path, override)
    assert message.startswith("--set")
    assert len(message) < 300


@pytest.mark.parametrize(
    "name", ["../../escape", "/abs", "..", ".", "", "a/b", "\x1b]0;pwn\x07x", "a\0b", "a" * 201, "é" * 101, "\u202ea"]
)
def test_a_name_is_one_directory_under_output_dir(tmp_path: Path, name: str) -> None:
    message = problems_of(tmp_path, name=name)
    assert "name is " in message
    assert "one directory under output_dir" in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ["a" * 200, "gpt2-117m_slw+x=3", "..a", "Lauf é 3"])
def test_other_names_are_names(tmp_path: Path, name: str) -> None:
    config = load_config(write(tmp_path / "run.json", small_tree(name=name)))
    assert config.run_dir.parent == Path(config.output_dir)


def test_control_characters_of_any_input_are_escaped_in_the_message(tmp_path: Path) -> None:
    assert "output_dir" in problems_of(tmp_path, output_dir="a\x1b[2J")
    for text in (problems_of(tmp_path, "seed\x9b=1"), problems_of(tmp_path, 'data.tail="\x9b2J\x7f"')):
        assert text.isprintable()
    assert str(UserError("a\x1b]0;x\x07\nb\t\u2028")) == "a\\x1b]0;x\\x07\nb\t\\u2028"
