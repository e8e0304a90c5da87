"""Bad input, each tried as a user would: one message that says what and where and what to do, exit 2, nothing lost."""

import contextlib
import io
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.loading import load_config
from megatron_ext.errors import UserError
from megatron_ext.launch import launcher
from megatron_ext.worker import main as worker
from tests.cli.conftest import leave_traces
from tests.ranks import run_ranks
from tests.train.small_run import VOCABULARY, cli, write_config


@pytest.fixture
def folder(tmp_path: Path, corpus: Path) -> Path:
    """A copy of the corpus, which a test may spoil, without the index that others have built of it."""
    for path in corpus.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    return tmp_path


def run_worker(_rank: int, _world_size: int, *arguments: str) -> tuple[int, str]:
    """Exit status and error output of the worker; for run_ranks."""
    captured = io.StringIO()
    with contextlib.redirect_stderr(captured):
        status = worker(list(arguments))
    return status, captured.getvalue()


def refusal(config: Path, *arguments: str, ranks: int = 1) -> str:
    """The one message of a run that must not start."""
    before = contents(config.parent)
    # Where ranks watch each other a failure ends the process at once, and with it the report that this test waits for.
    unwatched = ("--set", "cluster.heartbeat_seconds=0")
    results: list[tuple[int, str]] = run_ranks(run_worker, ranks, str(config), *unwatched, *arguments, init=False)
    assert [status for status, _ in results] == [2] * ranks
    lines = [line for _, text in results for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, f"{ranks} rank(s) said: {results}"
    assert "Traceback" not in "".join(text for _, text in results)
    after = contents(config.parent)
    assert before == {path: data for path, data in after.items() if path in before}, "input was changed"
    return lines[0]


def contents(folder: Path) -> dict[Path, bytes]:
    """All files but the two that every start writes to."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in {"log.txt", ".lock"})
    return {path: path.read_bytes() for path in files}


def model(**values: Any) -> dict[str, Any]:
    return {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": VOCABULARY} | values


def nothing(_folder: Path) -> None:
    """Leave the data as it is."""


def missing_tokens(folder: Path) -> None:
    (folder / "corpus.bin").unlink()


def truncated_tokens(folder: Path) -> None:
    path = folder / "corpus.bin"
    path.write_bytes(path.read_bytes()[:-100])


def another_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def training(seq_len: int = 32, batch_size: int = 8, steps: int = 40) -> dict[str, Any]:
    return {"training": {"seq_len": seq_len, "batch_size": batch_size, "duration": {"steps": steps}}}


PLAIN: dict[str, Any] = {"curriculum": {"pacing": "constant"}, "learning_rate": {"peak": 1e-3}}
LONG = training(seq_len=65536, batch_size=1, steps=2) | PLAIN | {"parallel": {}}
SMALL_VOCABULARY = {"model": model(vocab_size=200)}


@pytest.mark.parametrize(
    ("damage", "sections", "ranks", "words"),
    [
        (missing_tokens, {}, 1, ("corpus.bin does not exist", "preprocess")),
        (missing_tokens, {}, 2, ("corpus.bin does not exist",)),
        (truncated_tokens, {}, 1, ("corpus.bin: cut off", "corpus.idx calls for")),
        (another_vocabulary, {}, 1, ("another tokenizer", "data.tokenizer")),
        (broken_tokenizer, {}, 1, ("tokenizer.json",)),
        (nothing, SMALL_VOCABULARY, 1, ("model.vocab_size 200 is too small for the data", "at least 300")),
        (nothing, LONG, 1, ("less than one sample", "lower training.seq_len")),
        (nothing, training(batch_size=7), 2, ("7 sequences does not divide evenly over 2 data-parallel ranks",)),
        (nothing, {"parallel": {"tensor": 2}}, 1, ("parallel.tensor is 2",)),
    ],
)
def test_what_cannot_be_trained_is_said_once(
    folder: Path, damage: Callable[[Path], None], sections: dict[str, Any], ranks: int, words: tuple[str, ...]
) -> None:
    damage(folder)
    message = refusal(write_config(folder, **({"model": model()} | sections)), ranks=ranks)
    for part in words:
        assert part in message


def test_checkpoint_that_another_model_wrote_or_that_was_cut_off(folder: Path) -> None:
    plain = training(steps=2) | PLAIN
    config = write_config(folder, model=model(), **plain)
    [(status, text)] = run_ranks(run_worker, 1, str(config), init=False)
    assert status == 0, text
    message = refusal(write_config(folder, model=model(hidden_size=32), **plain))
    assert "model.hidden_size is 16 there and 32 here" in message
    assert "another name" in message
    manifest = folder / "small" / "checkpoints" / "step_2" / "checkpoint.json"
    manifest.write_text(manifest.read_text()[:50])
    assert f"{manifest} cannot be read" in refusal(write_config(folder, model=model(), **plain))


def test_mistake_in_the_config(folder: Path) -> None:
    message = refusal(write_config(folder), "--set", "trainig.batch_size=8")
    for part in ("trainig", "did you mean", "training"):
        assert part in message


def test_config_that_does_not_exist(tmp_path: Path) -> None:
    done = cli("train", str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "none.json") in done.stderr


def test_port_in_use(folder: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        done = cli("train", str(write_config(folder)), "--master-port", str(port))
    assert done.returncode == 2
    assert f"--master-port {port} is in use" in done.stderr
    assert not (folder / "small").exists()


@pytest.mark.parametrize(
    ("damage", "sections", "words"),
    [
        (missing_tokens, {}, "corpus.bin does not exist"),
        (truncated_tokens, {}, "corpus.bin: cut off"),
        (nothing, training(batch_size=7), "a batch of 7"),
    ],
)
def test_data_and_batches_are_checked_before_ranks_start(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    sections: dict[str, Any],
    words: str,
) -> None:
    damage(folder)
    monkeypatch.setattr(launcher, "start_ranks", lambda *_args, **_options: pytest.fail("ranks were started"))
    with pytest.raises(UserError, match=words):
        launcher.launch(launcher.this_machine(2), load_config(write_config(folder, **sections)))


def test_mistake_that_only_the_ranks_find_goes_through_the_launcher(folder: Path) -> None:
    config = write_config(folder)
    leave_traces(load_config(config), step=10)  # a checkpoint of one rank
    done = cli("train", str(config), "--nproc", "2")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    # A CUDA build of torch remarks on a compiler without a device.
    said = [
        line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line and " INFO " not in line
    ]
    assert len(said) == 1, done.stderr
