"""Datasets: megatron-core's own samples, splits and blends; the corpus whole; bad data found before a run."""

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.config.run import RunConfig
from megatron_ext.data import datasets, index_apart, index_cache
from megatron_ext.data.blend import Blend
from megatron_ext.data.datasets import GPTSamples, Samples, _Vocabulary, build_training
from megatron_ext.data.sources import check_data
from megatron_ext.errors import UserError
from tests.data.corpora import SEPARATOR, VOCABULARY, build, documents, run_config, whole, write_tokens
from tests.ranks import run_ranks


def _all(samples: Samples) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.stack([whole(samples, index) for index in range(len(samples))])


def _config(tmp_path: Path, count: int = 300, **sections: Any) -> RunConfig:
    prefix = write_tokens(tmp_path / "corpus", documents(count))
    return run_config({"sources": [{"prefix": prefix}], "split": [90, 10, 0]}, **sections)


def _assert_equal(one: Samples, other: Samples) -> None:
    np.testing.assert_array_equal(_all(one), _all(other))


@pytest.mark.parametrize("steps", [10, 100, 400])  # part of an epoch, more than one, many
def test_samples_are_those_of_megatron(tmp_path: Path, steps: int) -> None:
    config = _config(tmp_path, training={"duration": {"steps": steps}}, seed=1234)
    ours = build(config)
    theirs = BlendedMegatronDatasetBuilder(
        GPTDataset,
        [steps * 8, 5, 0],
        lambda: True,
        GPTDatasetConfig(
            random_seed=1234,
            sequence_length=16,
            blend=([str(tmp_path / "corpus")], None),
            split="90,10,0",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            path_to_cache=str(tmp_path / "theirs"),
            tokenizer=_Vocabulary(vocab_size=60_000),
        ),
    ).build()
    for mine, other in ((ours.train, theirs[0]), (ours.valid, theirs[1])):
        for index in range(len(mine)):
            assert whole(mine, index)[:-1].tolist() == other[index]["tokens"].tolist()
            assert whole(mine, index)[1:].tolist() == other[index]["labels"].tolist()


@given(index=st.integers(0, 79), first=st.integers(0, 16), data=st.data())
@settings(max_examples=300)
def test_part_of_a_sample_is_that_part(one_pass: Samples, index: int, first: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 17 - first))
    assert isinstance(one_pass, GPTSamples)
    expected = one_pass._query_document_sample_shuffle_indices(index)[0]
    assert one_pass.read(index, first, count).tolist() == expected[first : first + count].tolist()


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    # Documents shorter than a sample and longer than two, and some without a token, as other tools may write them.
    docs = documents(100, shortest=1, longest=40)
    docs[5:5] = docs[50:50] = [np.array([], dtype=np.int32)] * 3
    folder = tmp_path_factory.mktemp("one_pass")
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=np.uint16)
    for doc in docs:
        builder.add_document(doc, [len(doc)])
    builder.finalize(str(folder / "corpus.idx"))
    config = run_config({"sources": [{"prefix": str(folder / "corpus")}]}, training={"duration": {"steps": 10}})
    return build(config).train


def test_documents_are_split_and_none_is_in_two_parts(tmp_path: Path) -> None:
    docs = documents(300)
    datasets = build(_config(tmp_path, training={"duration": {"steps": 200}}, validation={"samples": 1000}))
    train, valid = set(_all(datasets.train).ravel()), set(_all(datasets.valid).ravel())
    assert train - {SEPARATOR} == set(np.concatenate(docs[:270])) - {SEPARATOR}
    assert valid - {SEPARATOR} <= set(np.concatenate(docs[270:]))
    # Validation is one pass: all but the last partial sample, nothing twice.
    tokens = sum(map(len, docs[270:]))
    assert len(datasets.valid) == (tokens - 1) // 16


def test_seed_orders_training_and_not_validation(tmp_path: Path) -> None:
    config = _config(tmp_path, seed=1)
    first, second = build(config), build(run_config(config.data.model_dump(), seed=2))
    assert len(first.valid) == 5
    _assert_equal(first.valid, second.valid)
    assert not np.array_equal(_all(first.train), _all(second.train))
    alone = build_training(config.data, seq_len=16, vocab_size=VOCABULARY, samples=160, seed=1)
    _assert_equal(alone, first.train)


def test_samples_are_pieces_of_the_corpus_and_many_passes_use_every_token_equally(tmp_path: Path) -> None:
    samples = _all(build(_config(tmp_path, training={"duration": {"steps": 1000}})).train)
    before, after = samples[:, :-1], samples[:, 1:]
    # Ids count up within a document and the next document begins after a separator.
    assert np.all((after == before + 1) | (after == SEPARATOR) | (before == SEPARATOR))
    counts = Counter(samples[:, :-1].ravel().tolist())
    del counts[SEPARATOR]
    passes = len(samples) * 16 / sum(map(len, documents(300)[:270]))
    assert passes > 10
    assert max(counts.values()) - min(counts.values()) <= 2
    assert abs(np.mean(list(counts.values())) - passes) < 1


def test_corpora_given_apart(tmp_path: Path) -> None:
    docs = documents(200)
    train = write_tokens(tmp_path / "train", docs[:150])
    valid = write_tokens(tmp_path / "valid", docs[150:])
    config = run_config({"train": [{"prefix": train}], "valid": [{"prefix": valid}]})
    datasets = build(config)
    assert set(_all(datasets.train).ravel()) <= set(np.concatenate(docs[:150]))
    assert set(_all(datasets.valid).ravel()) <= set(np.concatenate(docs[150:]))


def _blend_config(tmp_path: Path, weights: tuple[float, ...], **sections: Any) -> RunConfig:
    docs = documents(300)
    parts = [docs[first :: len(weights)] for first in range(len(weights))]
    sources = [
        {"prefix": write_tokens(tmp_path / f"part{number}", part), "weight": weight}
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
    ]
    return run_config({"sources": sources, "split": [80, 20, 0]}, **sections)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0, 2.0), (1.0, 1e-6)])
def test_blend_keeps_to_its_weights_from_the_start(tmp_path: Path, weights: tuple[float, ...]) -> None:
    train = build(_blend_config(tmp_path, weights, training={"duration": {"steps": 50}})).train
    assert isinstance(train, Blend)
    assert len(train) == 400
    docs = documents(300)
    owner = {int(doc[0]): number % len(weights) for number, doc in enumerate(docs)}
    firsts = np.array(sorted(owner))
    taken = np.zeros(len(weights))
    for index in range(len(train)):
        sample = whole(train, index)
        token = int(sample[sample != SEPARATOR][0])
        taken[owner[int(firsts[np.searchsorted(firsts, token, side="right") - 1])]] += 1
        wanted = np.array(weights) / sum(weights) * (index + 1)
        assert np.all(np.abs(taken - wanted) <= len(weights))


def test_blend_has_the_order_of_megatron(tmp_path: Path) -> None:
    train = build(_blend_config(tmp_path, (3.0, 1.0), training={"duration": {"steps": 50}})).train
    assert isinstance(train, Blend)
    assert isinstance(train.parts[0], GPTSamples)
    theirs = BlendedDataset(list(train.parts), [3.0, 1.0], 400, train.parts[0].config)
    np.testing.assert_array_equal(theirs.dataset_index, train.part_of)
    np.testing.assert_array_equal(theirs.dataset_sample_index, train.index_of)


def _call_pickled(function: Callable[..., Any], *arguments: Any, directory: Path) -> Any:
    """As another process would, whose start takes seconds: that it is one is test_index_cache's matter."""
    assert directory.is_dir()
    called, given = pickle.loads(pickle.dumps((function, arguments)))
    return called(*given)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_large_index_is_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool) -> None:
    config = _blend_config(tmp_path, (3.0, 1.0))
    here = build(config).train
    monkeypatch.setattr(index_cache, "_LARGE", 300)  # the blend, and the larger of the two indexes
    if not real:
        monkeypatch.setattr(index_apart, "call_apart", _call_pickled)
    _assert_equal(build(run_config(config.model_dump()["data"] | {"index_cache": str(tmp_path / "b")})).train, here)


def test_index_is_found_again_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path)
    before = build(config).train
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("corpus.bin", "corpus.idx"):
        (tmp_path / name).rename(moved / name)
    data = {
        "sources": [{"prefix": str(moved / "corpus")}],
        "split": [90, 10, 0],
        "index_cache": str(tmp_path / "index_cache"),
    }

    def no_building(*_: object, **__: object) -> None:
        raise RuntimeError("built again")

    monkeypatch.setattr(datasets, "build_index", no_building)
    _assert_equal(build(run_config(data)).train, before)
    with pytest.raises(RuntimeError, match="built again"):
        build(run_config(data, seed=99))


@pytest.mark.parametrize(
    "changed",
    [
        {"training": {"seq_len": 8}},
        {"training": {"duration": {"steps": 21}}},
        {"training": {"duration": {"steps": 500}}},
        {"seed": 99},
        {"data": {"split": [50, 50, 0]}},
        {"validation": {"samples": 3}},
    ],
)
def test_an_index_of_other_settings_is_never_taken(tmp_path: Path, changed: dict[str, Any]) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(300))
    data = {"sources": [{"prefix": prefix}], "split": [90, 10, 0]}
    build(run_config(data))  # leaves its index in the cache beside the corpus
    other = {**data, **changed.get("data", {})}
    sections = {name: section for name, section in changed.items() if name != "data"}
    cached = build(run_config(other, **sections))
    fresh = build(run_config({**other, "index_cache": str(tmp_path / "empty")}, **sections))
    _assert_equal(cached.train, fresh.train)
    _assert_equal(cached.valid, fresh.valid)


def test_changed_corpus_gets_a_new_index(tmp_path: Path) -> None:
    data = {"sources": [{"prefix": str(tmp_path / "corpus")}], "split": [90, 10, 0]}
    write_tokens(tmp_path / "corpus", documents(300))
    build(run_config(data))
    write_tokens(tmp_path / "corpus", documents(300, seed=1))
    _assert_equal(build(run_config(data)).train, build(run_config({**data, "index_cache": str(tmp_path / "b")})).train)


def test_building_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    build(_config(tmp_path))
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
    assert [w for w in recwarn if "pad" in str(w.message)] == []


def _on_rank(rank: int, _size: int, config: RunConfig) -> list[list[int]]:
    if rank == 2:  # a host with a disk of its own
        config = run_config(config.data.model_dump() | {"index_cache": f"{config.data.index_cache}-{rank}"})
    datasets = build(config)
    return [whole(datasets.train, 3).tolist(), whole(datasets.valid, 1).tolist()]


def test_ranks_build_the_same_with_and_without_a_shared_disk(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(300))
    config = run_config({"sources": [{"prefix": prefix}], "split": [90, 10, 0], "index_cache": str(tmp_path / "cache")})
    assert run_ranks(_on_rank, 3, config, init=False) == 3 * [_on_rank(0, 1, config)]


@pytest.mark.parametrize(
    ("data", "sections", "message"),
    [
        (
            {"split": [1, 99, 0]},
            {"training": {"seq_len": 512}},
            r"its 3 train documents of 300.* less than one sample of training\.seq_len \+ 1 = 513",
        ),
        ({"split": [90, 0.1, 0]}, {}, r"its 0 valid documents of 300 under data\.split \[90\.0, 0\.1, 0\.0\]"),
        ({}, {"model": {"vocab_size": 100}}, r"model\.vocab_size 100 is too small for the data"),
        ({"tokenizer": "gpt2"}, {}, "made with another tokenizer"),
        ({"tokenizer": "nowhere.json"}, {}, r"nowhere\.json: no such file"),
    ],
)
def test_bad_data_is_found_before_and_in_a_run(
    tmp_path: Path, data: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(300), sidecar="tokenizer" in data)
    config = run_config({"sources": [{"prefix": prefix}], **data}, **sections)
    with pytest.raises(UserError, match=message):
        build(config)
    with pytest.raises(UserError, match=message):
        check_data(config.data, seq_len=config.training.seq_len, vocab_size=config.model.vocab_size)
