"""What is wrong with token files is said: at the start, as they are read, or by ``data verify``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.loader import TrainLoader, ValidationLoader
from megatron_ext.data.sources import open_source
from megatron_ext.data.token_files import HEADER, TokenPaths, read_sidecar
from megatron_ext.data.verify import verify
from megatron_ext.errors import UserError
from tests.data.corpora import VOCABULARY, build, documents, run_config, write_tokens

LARGE = VOCABULARY + 1


def _change(path: Path, at: int, value: int, dtype: type[np.integer]) -> None:
    array = np.memmap(path, dtype=dtype, mode="r+", offset=at)
    array[0] = value
    array.flush()


@pytest.mark.parametrize("document", [0, 1, 25, 49])
def test_positions_of_an_index_without_a_sidecar_are_checked(tmp_path: Path, document: int) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(50))
    idx = TokenPaths.of(prefix).idx
    at = HEADER.size + 4 * 50 + 8 * document
    _change(idx, at, int(np.fromfile(idx, dtype=np.int64, count=1, offset=at)[0]) + 2, np.int64)
    with pytest.raises(UserError, match=r"corpus\.idx: damaged, its lengths and positions contradict"):
        open_source(prefix)


def test_swapped_lengths_of_an_index_without_a_sidecar_are_seen(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(50))
    idx = TokenPaths.of(prefix).idx
    lengths = np.memmap(idx, dtype=np.int32, mode="r+", offset=HEADER.size, shape=(50,))
    assert lengths[3] != lengths[4]
    lengths[[3, 4]] = lengths[[4, 3]]
    lengths.flush()
    with pytest.raises(UserError, match="contradict each other"):
        open_source(prefix)


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("tail", ["truncate", "recycle"])
def test_an_id_beyond_the_vocabulary_is_one_message(tmp_path: Path, tail: str, sources: int) -> None:
    prefixes = [write_tokens(tmp_path / f"corpus{i}", documents(300, seed=i)) for i in range(sources)]
    curriculum = {"pacing": "linear", "start": 4, "multiple": 4, "duration": {"steps": 10}}
    entries = [{"prefix": prefix} for prefix in prefixes]
    config = run_config({"sources": entries, "split": [90, 10, 0], "tail": tail}, curriculum=curriculum)
    datasets, plan = build(config), config.plan()
    np.memmap(TokenPaths.of(prefixes[-1]).bin, dtype=np.uint16, mode="r+")[::20] = LARGE  # after the check at the start
    message = rf"corpus{sources - 1}\.bin: holds the token id {LARGE}, and model.vocab_size is {VOCABULARY:,}"
    with TrainLoader(datasets.train, plan) as loader, pytest.raises(UserError, match=message):
        list(map(loader.batch, plan))
    with pytest.raises(UserError, match=message):
        list(ValidationLoader(datasets.valid, micro_batch_tokens=64))


_SHRINK = """
import os, sys
from megatron_ext.errors import UserError
from megatron_ext.data.loader import TrainLoader
from tests.data.corpora import build, documents, run_config, write_tokens
prefix = write_tokens(__import__("pathlib").Path(sys.argv[1]), documents(300))
config = run_config({"sources": [{"prefix": prefix}], "split": [90, 10, 0]})
datasets, plan = build(config), config.plan()
with TrainLoader(datasets.train, plan, prefetch=2) as loader:
    loader.batch(plan[0])
    os.truncate(f"{prefix}.{sys.argv[2]}", 10)
    try:
        for step in plan:
            loader.batch(step)
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("file", ["bin", "idx"])
def test_a_file_that_shrinks_under_a_run_is_one_message(tmp_path: Path, file: str) -> None:
    """In a process of its own, which SIGBUS would end."""
    command = [sys.executable, "-c", _SHRINK, str(tmp_path / "corpus"), file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"corpus.{file}: cut off while it was read, 10 bytes where it had" in done.stdout


def test_verify_finds_what_the_start_cannot(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(100), sidecar=True)
    paths = TokenPaths.of(prefix)
    found = verify(prefix)
    assert found.documents == 100
    assert found.against == ("SHA-256 of .idx and .bin", "the range of ids")
    _change(paths.bin, 100, 7, np.uint16)
    open_source(prefix)
    with pytest.raises(UserError, match=r"corpus\.bin: damaged, its SHA-256 is not that in"):
        verify(prefix)
    _change(paths.bin, 100, VOCABULARY + 7, np.uint16)
    with pytest.raises(UserError, match=r"its largest token id is 60007 where"):
        verify(prefix)


def test_verify_of_files_of_earlier_versions_and_other_tools(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(100), sidecar=True)
    paths = TokenPaths.of(prefix)
    values = json.loads(paths.sidecar.read_text())
    del values["bin_sha256"]
    paths.sidecar.write_text(json.dumps(values))
    assert verify(prefix).against == ("SHA-256 of .idx", "the range of ids")
    paths.sidecar.write_text(json.dumps(values | {"later": 1, "documents": 99}))
    with pytest.raises(UserError, match=r"corpus\.json: damaged, it tells of 99 documents"):
        verify(prefix)
    paths.sidecar.unlink()
    assert verify(prefix).against == ()


@pytest.mark.parametrize("change", [{"max_token": "7"}, {"tokens": None}, {"idx_sha256": 5}])
def test_a_sidecar_of_wrong_types_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    sidecar = TokenPaths.of(write_tokens(tmp_path / "corpus", documents(9), sidecar=True)).sidecar
    assert read_sidecar(sidecar) is not None
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    assert read_sidecar(sidecar) is None


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = [tmp_path / f".corpus.partial-{ended.pid}.{suffix}" for suffix in ("bin", "idx", "json")]
    kept = [
        tmp_path / f".corpus.partial-{os.getppid()}.bin",
        tmp_path / f".corpus.partial-{ended.pid}.txt",
        tmp_path / f".corpus2.partial-{ended.pid}.bin",
    ]
    for path in (*left, *kept):
        path.write_bytes(b"")
    write_tokens(tmp_path / "corpus", documents(9))
    assert not [path for path in left if path.exists()]
    assert [path for path in kept if path.exists()] == kept


def test_data_verify_is_a_command(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(9), sidecar=True)
    command = [sys.executable, "-m", "megatron_ext", "data", "verify", prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "9 documents" in done.stdout
    assert "right by SHA-256 of .idx and .bin and the range of ids" in done.stdout
    _change(TokenPaths.of(prefix).bin, 4, 9, np.uint16)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
