"""Columns of a metrics file against the records that are read one by one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.metrics.columns import read_columns
from megatron_ext.metrics.jsonl import FILE_NAME, read_metrics
from megatron_ext.metrics.records import EvalRecord, EventRecord, encode
from tests.metrics.test_records import train_record

NAMES = ("step", "tokens", "loss", "loss_ratio", "skipped", "mfu", "prefix_loss", "adam_var_l1", "grad_norm")
numbers = st.floats(allow_nan=True, allow_infinity=True)
records = st.one_of(
    st.builds(
        train_record,
        step=st.integers(1, 10**9),
        tokens=st.integers(1, 10**13),
        loss=st.floats(0, 20) | numbers,
        loss_ratio=st.floats(0, 20),
        mfu=st.none() | st.floats(0, 1),
        skipped=st.booleans(),
        prefix_loss=st.none() | st.floats(0, 20),
        adam_var_l1=st.none() | numbers,
        sample_ids=st.none() | st.just((3, 4)),
    ),
    st.builds(EvalRecord.from_loss, step=st.just(1), tokens=st.just(8), loss=numbers),
    st.builds(EventRecord, st.just("odd"), st.dictionaries(st.sampled_from(["loss", "path"]), st.text(max_size=3))),
)
spacings = st.sampled_from([None, (",", ":"), (" , ", " : ")])


def naive(path: Path, kind: str = "train") -> dict[str, list[float]]:
    metrics = read_metrics(path)
    found: Any = metrics.train if kind == "train" else metrics.evaluations
    values = {name: [getattr(record, name, None) for record in found] for name in NAMES}
    return {name: [math.nan if v is None else float(v) for v in column] for name, column in values.items()}


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.tuples(records, spacings), max_size=12), cut=st.integers(0, 60), block=st.sampled_from([1, 500])
)
def test_columns_are_those_of_the_records(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[Any, Any]], cut: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("columns") / FILE_NAME
    texts = [json.dumps(json.loads(encode(record)), separators=spacing) for record, spacing in lines]
    content = "".join(text + "\n" for text in texts).encode()
    path.write_bytes(content[: max(0, len(content) - cut)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_ext.metrics.columns._BLOCK", block)
        for kind in ("train", "eval"):
            columns, expected = read_columns(path.parent, NAMES, kind=kind), naive(path, kind)
            assert list(columns) == list(NAMES)
            for name in NAMES:
                np.testing.assert_array_equal(columns[name], expected[name])


def test_lines_of_our_own_are_found_without_parsing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detail = {"layers": {"0": [3.0, 0.5], "1": [2.0, 0.1]}, "kinds": {"norm": [1.0, 0.5]}}
    measured = {"adam_var_max": 0.5, "adam_var_l1": 6.0, "adam_var": detail}
    lines = [
        encode(train_record(step=step, loss=1 / step, **({} if step % 7 else measured))) for step in range(1, 3001)
    ]
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")

    def refused(_line: object) -> object:
        raise AssertionError("a line was parsed")

    monkeypatch.setattr("megatron_ext.metrics.columns.json.loads", refused)
    columns = read_columns(tmp_path, ("step", "loss", "adam_var_max"))
    np.testing.assert_array_equal(columns["loss"], [1 / step for step in range(1, 3001)])
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(columns["adam_var_max"])), np.arange(6, 3000, 7))


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        "3",
        "",
        '{"kind": "train", "step": 1}',
        encode(train_record()).replace('"loss": 5.5, ', ""),
        encode(train_record()).replace('"loss": 5.5', '"loss": "5.5"'),
        encode(train_record()).replace('"loss": 5.5', '"loss": 5.5.5'),
        encode(train_record()).replace('"loss": 5.5', '"loss": +5.5'),
        encode(train_record()).replace('"loss": 5.5', '"loss": '),
        encode(train_record())[:-1],
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_broken_line_is_named(tmp_path: Path, line: str, number: int) -> None:
    lines = [encode(train_record(step=step)) for step in (1, 2, 3)]
    lines.insert(number - 1, line)
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"line {number}: not a metrics record"):
        read_columns(tmp_path, ("step", "loss"))


@pytest.mark.parametrize(
    "spelled", ["5.500000000000000000000000000000000001", "true", " 5.5", "null", "-0", "1e-320", "NaN"]
)
def test_every_spelling_of_a_number_is_read_as_json_reads_it(tmp_path: Path, spelled: str) -> None:
    lines = [encode(train_record(step=step, prefix_loss=5.5)) for step in (1, 2, 3)]
    lines[1] = lines[1].replace('"prefix_loss": 5.5', f'"prefix_loss": {spelled}')
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")
    value = json.loads(spelled)
    expected = [5.5, math.nan if value is None else float(value), 5.5]
    np.testing.assert_array_equal(read_columns(tmp_path, ("prefix_loss",))["prefix_loss"], expected)


def test_a_later_block_counts_its_lines_from_the_files_beginning(tmp_path: Path) -> None:
    lines = [encode(train_record(step=step)) for step in range(1, 2001)]
    lines[1500] = "{broken"
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 1501: not a metrics record"):
        read_columns(tmp_path, ("step",))


def test_a_last_line_without_its_newline_counts_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(encode(train_record(step=1)) + "\n" + encode(train_record(step=2)))
    assert read_columns(path, ("step",))["step"].tolist() == [1, 2]
    path.write_bytes(path.read_bytes()[:-1])
    assert read_columns(path, ("step",))["step"].tolist() == [1]


def test_empty_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl there"):
        read_columns(tmp_path, ("step",))
    (tmp_path / FILE_NAME).touch()
    assert {name: column.shape for name, column in read_columns(tmp_path, ("step", "loss")).items()} == {
        "step": (0,),
        "loss": (0,),
    }
