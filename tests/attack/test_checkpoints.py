"""Checkpoints of strangers and of failing disks, through the commands: nothing is executed, nothing wrong is loaded."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.small_run import cli, write_config, write_corpus

pytestmark = pytest.mark.slow

FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "rng_rank_0.pt")
CURRICULUM = {"pacing": "linear", "start": 8, "duration": {"steps": 6}}


class Touch:
    """A pickle of it makes a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on two ranks, with checkpoints after 4 and 8."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder)
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 8}}
    config = write_config(folder, training=training, curriculum=CURRICULUM, checkpoint={"every": {"steps": 4}})
    done = cli("train", str(config), "--nproc", "2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, whose config trains in the copy."""
    shutil.copytree(finished / "small", tmp_path / "small", symlinks=True)
    config = json.loads((finished / "run.json").read_text()) | {"output_dir": str(tmp_path)}
    (tmp_path / "run.json").write_text(json.dumps(config))
    return tmp_path / "small"


def _train(run: Path, *options: str) -> tuple[int, str]:
    done = cli("train", str(run.parent / "run.json"), "--nproc", "2", *options)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def _losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("listed", [True, False])
def test_no_command_executes_a_planted_pickle(run: Path, file: str, listed: bool) -> None:
    newest, sign = run / "checkpoints" / "step_8", run.parent / "executed"
    torch.save({"module": Touch(sign)}, newest / file)
    if not listed:  # as an earlier version wrote it, or a stranger
        manifest = json.loads((newest / "checkpoint.json").read_text())
        manifest = {key: value for key, value in manifest.items() if key not in ("files", "sha256")}
        (newest / "checkpoint.json").write_text(json.dumps(manifest))
    for command in (("generate", str(run), "--prompt", "king"), ("analyze", str(run), "--by-length", "--batches", "2")):
        done = cli(*command)
        assert "Traceback" not in done.stderr
        reads = file.startswith("mp_rank")
        assert done.returncode == (2 if reads else 0), done.stderr
        assert (file in done.stderr) == reads
        assert not sign.exists()
    before = _losses(run)
    status, text = _train(run)
    assert status == 0, text
    assert f"{newest / file} " in text
    assert (newest.parent / "step_8.damaged" / file).exists()
    assert _losses(run) == before, "steps 5 to 8 once more, from step_4"
    assert not sign.exists()


def _flip(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, int], object]] = {
    "flip": _flip,
    "cut": lambda path, seed: path.write_bytes(path.read_bytes()[: 100 * seed]),
    "gone": lambda path, _: path.unlink(),
    "of another checkpoint": lambda path, _: shutil.copy(path.parents[1] / "step_4" / path.name, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run: Path, damage: str, seed: int) -> None:
    file = sorted(path for path in (run / "checkpoints" / "step_8").iterdir() if path.suffix == ".pt")[seed]
    before = _losses(run)
    DAMAGES[damage](file, seed)
    status, text = _train(run, "--set", "checkpoint.fallback=false")
    assert (status, text.count("error:")) == (2, 1), text
    assert str(file) in text
    assert _losses(run) == before
    status, text = _train(run)
    assert status == 0, text
    assert _losses(run) == before, "bit for bit"
    assert {"step_4", "step_8", "step_8.damaged"} <= {path.name for path in (run / "checkpoints").iterdir()}
