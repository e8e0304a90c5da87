"""Loading: files, extends, presets, overrides; what is right is read, what is wrong is said in our own words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.loading import load_config, parse_json, parse_layers, read_layers
from megatron_ext.config.merging import ConfigLayer, merge_all
from megatron_ext.errors import UserError
from tests.config.builders import small_tree, write

# Wording of the validation library, which must not reach the user.
_FOREIGN = re.compile(
    r"Input should|Field required|Extra inputs|Value error|errors\.pydantic|pydantic|https?:|RunConfig|\[type="
)


def problems_of(tmp_path: Path, *overrides: str, **sections: Any) -> str:
    path = write(tmp_path / "run.json", small_tree(**sections))
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert not _FOREIGN.search(message), message
    return message.replace(str(path), "run.json")


def test_a_small_config_gets_its_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "run.json", small_tree()))
    assert config.curriculum.pacing == "constant"
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.micro_batch_tokens == config.max_positions == 128


def test_a_resolved_config_loads_as_itself(tmp_path: Path) -> None:
    tree = small_tree(curriculum={"pacing": "linear", "start": 8, "duration": {"steps": 50}})
    config = load_config(write(tmp_path / "run.json", tree))
    again = load_config(write(tmp_path / "resolved.json", config.model_dump(mode="json")))
    assert again == config
    assert again.digest() == config.digest()


def test_overrides_reach_every_kind_of_value(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path / "run.json", small_tree()),
        [
            "training.seq_len=64",
            "training.precision=bf16",
            "optimizer.betas=[0.8, 0.9]",
            "training.duration.tokens=5000",
            "curriculum.start=16",
            "curriculum.pacing=linear",
            "curriculum.duration.steps=9",
            'data.sources=[{"prefix": "other"}]',
            "metrics.tensorboard=false",
        ],
    )
    assert (config.training.seq_len, config.training.precision) == (64, "bf16")
    assert config.training.duration.tokens == 5000
    assert config.training.duration.steps is None
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model_dump()["curriculum"]["start"] == 16
    assert config.data.sources is not None
    assert config.data.sources[0].prefix == "other"
    assert not config.metrics.tensorboard


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=0", "--set: training.batch_size is 0: expected more than 0"),
        ("training.batch_size=8.5", "--set: training.batch_size is 8.5: expected a whole number"),
        (
            'training.batch_size="8"',
            '--set: training.batch_size is "8": expected a whole number; write 8 without quotes',
        ),
        ("training.batch_size=true", "--set: training.batch_size is true: expected a whole number"),
        ("training.duration.tokens=1e9", "tokens is 1000000000.0: expected a whole number; write 1000000000"),
        ("training.precision=fp8", 'training.precision is "fp8": expected one of "fp32", "bf16", "fp16"'),
        ("parallel.zero_stage=4", "parallel.zero_stage is 4: expected one of 0, 1, 2, 3"),
        ("model.hidden_dropout=1", "model.hidden_dropout is 1: expected less than 1"),
        ("seed=-1", "seed is -1: expected at least 0"),
        ("seed=2147483648", "seed is 2147483648: expected less than 2147483648"),
        ("training.batch_size=1" + "0" * 30, "expected at most 9007199254740992"),
        ("learning_rate.peak=high", 'learning_rate.peak is "high": expected a number'),
        ("metrics.tensorboard=1", "metrics.tensorboard is 1: expected true or false"),
        ("name=5", "name is 5: expected a string in double quotes; write --set 'name=\"5\"'"),
        ("model=5", "model is 5: expected an object, {...}"),
        ("training.duration=5", 'training.duration is 5: expected an object, {...}; a duration is {"steps": n}'),
        ("data.sources=corpus", 'data.sources is "corpus": expected a list, [...]'),
        ("data.sources=[]", "data.sources is []: expected at least 1 item"),
        ("data.split=[1, 2]", "data.split[2] is missing"),
        ("data.split=[1, 2, 3, 4]", "data.split is [1, 2, 3, 4]: expected at most 3 items"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas[1] is 1.5: expected less than 1"),
        ("validation.every={}", "validation.every is {}: a duration is"),
        ("curriculum.start=8", 'curriculum.pacing is missing; write one of "constant", "linear", "root", "discrete"'),
        ("curriculum.pacing=cubic", 'curriculum.pacing is "cubic": expected one of "constant", "linear"'),
        ("curriculum.pacing=linear", "curriculum.start is missing; it has no default. Length of the first step"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(tmp_path: Path, override: str, message: str) -> None:
    assert message in problems_of(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.seqlen=4", "did you mean training.seq_len?"),
        ("model.seqlen=4", "did you mean training.seq_len?"),
        ("training.seq_length=4", "did you mean training.seq_len?"),
        ("training.sq_len=4", "did you mean training.seq_len?"),
        ("trainig.seq_len=4", "trainig: unknown key; did you mean training?"),
        ("seq_len=4", "did you mean training.seq_len?"),
        ("model.seq_len=4", "did you mean training.seq_len?"),
        ("lr=3", "write learning_rate.peak instead"),
        ("optimizer.lr=3", "write learning_rate.peak instead"),
        ("learning_rate.max_lr=3", "write learning_rate.peak instead"),
        ("global_batch_size=3", "write training.batch_size instead"),
        ("train_tokens=3", 'write training.duration instead ({"steps": n} or {"tokens": n})'),
        ("zero_optimization.stage=2", "write parallel.zero_stage instead"),
        ("model.n_layer=2", "did you mean model.num_layers?"),
        ("curriculum={'pacing'}", "curriculum is \"{'pacing'}\""),
        ('data.sources=[{"path": "x"}]', "data.sources[0].path: unknown key"),
        ("qqqq=1", "the keys of a run config are name, output_dir, seed"),
        ("parallel.qqqq=1", "the keys of parallel are tensor, zero_stage"),
        ("Model.num_layers=1", "did you mean model?"),
        ("train_batch_size=4", "write training.batch_size 4"),
    ],
)
def test_an_unknown_key_is_answered_with_the_right_one(tmp_path: Path, override: str, hint: str) -> None:
    assert hint in problems_of(tmp_path, override)


def test_a_key_of_another_pacing_is_explained(tmp_path: Path) -> None:
    message = problems_of(tmp_path, curriculum={"pacing": "linear", "start": 8, "degree": 3, "duration": {"steps": 9}})
    assert message == 'run.json: curriculum.degree: unknown key; only pacing "root" has this key'


def test_all_problems_are_listed_one_a_line(tmp_path: Path) -> None:
    message = problems_of(tmp_path, "seed=-1", model={"num_layer": 3}, training={"batch_size": "8"}, lr=1)
    lines = message.splitlines()
    assert lines[0] == "4 problems in the run config:"
    assert [line.split(": ")[1].split(" is ")[0] for line in lines[1:]] == [
        "seed", "model.num_layer", "training.batch_size", "lr",
    ]  # fmt: skip


def test_each_problem_names_the_file_it_is_in(tmp_path: Path) -> None:
    write(tmp_path / "base.json", small_tree(training={"batch_size": -8}))
    main = write(tmp_path / "main.json", {"extends": "base.json", "model": {"num_layers": 0}})
    with pytest.raises(UserError) as caught:
        load_config(main, ["seed=-1"])
    sources = {line.split(": ")[1]: line.split(": ")[0].strip() for line in str(caught.value).splitlines()[1:]}
    assert sources == {
        "seed is -1": "--set",
        "model.num_layers is 0": str(main),
        "training.batch_size is -8": str(tmp_path / "base.json"),
    }


def test_an_empty_config_names_every_section_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"run\.json: learning_rate is missing; it has no default\. Warmup and"
    ) as caught:
        load_config(write(tmp_path / "run.json", {}))
    missing = re.findall(r": (\w+) is missing", str(caught.value))
    assert missing == ["model", "data", "training", "learning_rate"]


def test_long_values_are_cut(tmp_path: Path) -> None:
    message = problems_of(tmp_path, f"seed={'x' * 500}")
    assert len(message) < 200


def test_a_deepspeed_block_pasted_at_the_top_is_translated(tmp_path: Path) -> None:
    schedule = {"total_curriculum_step": 50, "difficulty_step": 8}
    block = {"enabled": True, "min_difficulty": 8, "max_difficulty": 128, "schedule_type": "fixed_linear"}
    message = problems_of(tmp_path, curriculum_learning=block | {"schedule_config": schedule})
    assert message.startswith('run.json: curriculum_learning: unknown key; write "curriculum": {"pacing": "linear"')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_trees(draw: st.DrawFn) -> dict[str, Any]:
    """A valid config, fully written out, in which some values are replaced and some keys are added."""
    curriculum = {"pacing": "root", "start": 8, "end": 128, "degree": 2, "duration": {"steps": 9}}
    tree = parse_layers([ConfigLayer("x", small_tree(curriculum=curriculum))]).model_dump(mode="json")
    for _ in range(draw(st.integers(1, 3))):
        node: Any = tree
        while True:
            key = draw(st.sampled_from(sorted(node)) | st.text(max_size=8)) if node else draw(st.text(max_size=8))
            if not isinstance(node.get(key), dict) or draw(st.booleans()):
                break
            node = node[key]
        node[key] = draw(json_values)
    return tree


@settings(max_examples=100)
@given(damaged_trees())
def test_whatever_is_in_the_file_it_loads_or_is_refused_in_our_words(tree: dict[str, Any]) -> None:
    try:
        config = parse_layers([ConfigLayer("run.json", json.loads(json.dumps(tree)))])
    except UserError as error:
        told = str(error)
        for line in told.splitlines():
            assert line.strip()
        written = json.dumps(tree, ensure_ascii=False)
        if not _FOREIGN.search(written):
            assert not _FOREIGN.search(told)
    else:
        assert parse_layers([ConfigLayer("again", config.model_dump(mode="json"))]) == config


def test_an_experiment_is_not_taken_for_a_run(tmp_path: Path) -> None:
    path = write(tmp_path / "many.json", {"name": "many", "base": "run.json", "variants": {"one": {}}})
    with pytest.raises(UserError, match=r"many\.json describes an experiment.*experiment run"):
        load_config(path)


def merged(path: Path) -> dict[str, object]:
    return merge_all(layer.tree for layer in read_layers(path))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        # Later files win, and the file itself wins over all.
        (
            {
                "parts/a.json": {"seed": 1, "name": "a", "model": {"num_layers": 1, "hidden_size": 1}},
                "parts/b.json": {"seed": 2, "model": {"num_layers": 2}},
                "main.json": {"extends": ["parts/a.json", "parts/b.json"], "model": {"vocab_size": 3}},
            },
            {"seed": 2, "name": "a", "model": {"num_layers": 2, "hidden_size": 1, "vocab_size": 3}},
        ),
        # One file is reached twice.
        (
            {
                "root.json": {"seed": 5},
                "a.json": {"extends": "root.json", "name": "a"},
                "b.json": {"extends": "root.json", "name": "b"},
                "main.json": {"extends": ["a.json", "b.json"]},
            },
            {"seed": 5, "name": "b"},
        ),
        # A byte order mark is no error.
        ({"main.json": '\ufeff{"seed": 1}'}, {"seed": 1}),
    ],
)
def test_what_files_say_together(tmp_path: Path, files: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, tree in files.items():
        write(tmp_path / name, tree)
    assert merged(tmp_path / "main.json") == wanted


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "root.json", {"seed": 5})
    write(tmp_path / "deep" / "middle.json", {"extends": "../root.json"})
    main = write(tmp_path / "deep" / "deeper" / "main.json", {"extends": "../middle.json"})
    monkeypatch.chdir(tmp_path / "deep")
    assert merged(main) == {"seed": 5}
    assert merged(Path("deeper/main.json")) == {"seed": 5}


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


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        *((value, "extends is .*: expected a file name") for value in (3, None, [1], [""], {"file": "a.json"})),
        ("preset:gpt2-117M", r"no preset 'gpt2-117M'; did you mean preset:gpt2-117m\? .*gpt3-175b"),
        (
            "base.json",
            r'base\.json does not exist \(named by "extends" in .*main\.json\); .*did you mean .*bases\.json',
        ),
        ("nowhere.json", r"nowhere\.json does not exist .*; check the path$"),
        (".", "is a directory"),
        ("binary.json", r"not UTF-8 text \(byte 10\)"),
        ("loop.json", "cannot be read"),
        ("a\0.json", "cannot be read"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, extends: object, message: str) -> None:
    write(tmp_path / "bases.json", {})
    (tmp_path / "binary.json").write_bytes(b'{"name": "\xff\xfe"}')
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(UserError, match=message):
        read_layers(write(tmp_path / "main.json", {"extends": extends}))


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
    where = re.escape(f"run.json:{line}:{column}: no valid JSON at line {line}, column {column}: ")
    with pytest.raises(UserError, match=f"^{where}.*{re.escape(hint)}"):
        parse_json(text, source="run.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "the file holds .*: expected a JSON object") for text in ("[1]", "3", "null", '"a"', "true")),
        *((f'{{"seed": {number}}}', f"{number} is not a number") for number in ("NaN", "Infinity", "-Infinity")),
        ('{"data": {"sources": [{}, {"prefix": "a", "prefix": "a"}]}}', r"data\.sources\[1\]\.prefix is written twice"),
        ('{"": 1, "": 2}', "is written twice"),
        ("[" * 100_000, ""),
        ('{"seed": ' + "1" * 5000 + "}", ""),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_strict_json_object_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^run\.json: .*{message}"):
        parse_json(text, source="run.json")


def test_comments_and_schema_references_are_dropped() -> None:
    text = '{"$schema": "s", "$comment": "one", "model": {"$comment": "two", "$comment": "three", "num_layers": 2}}'
    assert parse_json(text, source="run.json") == {"model": {"num_layers": 2}}
