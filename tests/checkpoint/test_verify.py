"""What is read of a checkpoint before it is loaded: its manifest, and that its files are whole and hold no code."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.checkpoint.store import Manifest, content_sum, file_sum, own_files, write_manifest
from megatron_ext.checkpoint.verify import check_files, check_resumable, read_manifest
from megatron_ext.engine.state_files import read_state
from megatron_ext.errors import UserError
from tests.checkpoint.test_store import manifest_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(st.text(max_size=5), JSON, max_size=4)


@settings(max_examples=30)
@given(
    step=st.integers(0, 10**12),
    config=OBJECT,
    state=OBJECT,
    skipped=st.lists(st.lists(st.integers(0, 10**12), min_size=2, max_size=2), max_size=3),
)
def test_manifest_comes_back(
    tmp_path_factory: pytest.TempPathFactory, step: int, config: Any, state: Any, skipped: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    manifest = manifest_of(step, config=config, determining=config, loss_ratio=state, skipped_samples=skipped)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_manifest_is_the_file_that_it_was(tmp_path: Path) -> None:
    """Checkpoints of earlier versions are read, also those from before guards and adaptive pacing."""
    write_manifest(tmp_path, manifest_of())
    written = json.loads((tmp_path / "checkpoint.json").read_text())
    old = {"step", "tokens", "config", "determining", "layout", "loss_ratio", "format"}
    assert written.keys() == old | {"curriculum", "guard", "skipped_samples", "files", "sha256"}
    assert written["format"] == 1
    (tmp_path / "checkpoint.json").write_text(json.dumps({key: written[key] for key in old}))
    assert read_manifest(tmp_path) == manifest_of()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is no checkpoint: it has no checkpoint\.json; give a directory"),
        (b'{"step": 3', r"checkpoint\.json cannot be read .*older checkpoint"),
        (b"\xff\xfe", r"checkpoint\.json cannot be read"),
        (b"[1]", "has format None, this version reads format 1"),
        (b'{"format": 2}', "has format 2, this version reads format 1"),
        (b"null", "has format None"),
        (b"[" * 10**5, r"checkpoint\.json cannot be read \(maximum recursion"),
        (b'{"format": "\\u001b]0;x"}', r"has format '\\x1b\]0;x', this version"),
    ],
)
def test_damaged_manifest_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "checkpoint.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -5}, r"\(step: Input should be greater than or equal to 0, found -5\)"),
        ({"step": "x"}, r"\(step: Input should be a valid integer, found 'x'\)"),
        ({"step": True}, r"\(step: .*, found True\)"),
        ({"step": 10**300}, r"\(step: "),
        ({"step": None}, r"\(step: .*, found None\)"),
        ({"tokens": 1.5}, r"\(tokens: .*, found 1\.5\)"),
        ({"config": [1]}, r"\(config: .*, found a list\)"),
        ({"layout": {"tensor": "2"}}, r"\(layout\.tensor: .*, found '2'\)"),
        ({"layout": {}}, "a layout, skipped_samples or files as no run writes"),
        ({"layout": {"world_size": 1, "tensor": 0, "zero_stage": 0}}, "a layout, skipped_samples or files"),
        ({"skipped_samples": "x"}, r"\(skipped_samples: .*, found 'x'\)"),
        ({"skipped_samples": [[1, -2]]}, r"\(skipped_samples\.0\.1: .*, found -2\)"),
        ({"skipped_samples": [[1]]}, "a layout, skipped_samples or files"),
        ({"files": {"a": []}}, "a layout, skipped_samples or files"),
        ({"files": {"a": {"b": 1}}}, r"\(files\.a: .*, found a dict\)"),
        ({"hue": 3}, r"\(hue: "),
        ({"\x1b[2J": 3}, r"\(\\x1b\[2J: "),
        ({"tokens": ...}, r"\(tokens: Field required\)"),
    ],
)
def test_a_manifest_of_another_form_is_one_message(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = {**asdict(manifest_of()), **changes}
    content = {key: value for key, value in content.items() if value is not ...}
    path = tmp_path / "step_3" / "checkpoint.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**content, "sha256": content_sum(content)}))
    with pytest.raises(
        UserError, match=rf"step_3/checkpoint\.json has .*{message}.*; continue from an older checkpoint"
    ):
        read_manifest(path.parent)


def test_any_changed_byte_of_a_manifest_is_seen(tmp_path: Path) -> None:
    """Every bit of the file: refused, or without a meaning (white space)."""
    manifest = manifest_of(files={"a.pt": [5, "00"]}, loss_ratio={"lowest": 1.5})
    write_manifest(tmp_path, manifest)
    path = tmp_path / "checkpoint.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (1, 64):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            try:
                assert read_manifest(tmp_path) == manifest, f"byte {place}"
            except UserError:
                continue


def test_step_and_name_agree(tmp_path: Path) -> None:
    (tmp_path / "step_30").mkdir()
    write_manifest(tmp_path / "step_30", manifest_of(25))
    with pytest.raises(UserError, match=r"step_30/checkpoint\.json is of step 25, and its directory is called step_30"):
        read_manifest(tmp_path / "step_30")
    (tmp_path / "step_30").rename(tmp_path / "best")
    assert read_manifest(tmp_path / "best").step == 25


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_file_has_one_writer_and_is_read_by_those_who_need_it(tensor: int) -> None:
    ranks = range(2 * tensor)
    names = ["other.txt", "x_model_states.pt", *(f"rng_rank_{rank}.pt" for rank in ranks)]
    names += [f"mp_rank_{place:02d}_model_states.pt" for place in range(tensor)]
    for prefix in ("zero", "bf16_zero"):
        names += [f"{prefix}_pp_rank_{d}_mp_rank_{t:02d}_optim_states.pt" for d in (0, 1) for t in range(tensor)]
    written = [own_files(names, rank, tensor) for rank in ranks]
    assert sorted(name for part in written for name in part) == sorted(names)
    for rank in ranks:
        read = own_files(names, rank, tensor, shared=True)
        data, place = divmod(rank, tensor)
        zero = f"zero_pp_rank_{data}_mp_rank_{place:02d}_optim_states.pt"
        own = {f"rng_rank_{rank}.pt", f"mp_rank_{place:02d}_model_states.pt", zero, f"bf16_{zero}"}
        assert set(read) == own | (set() if rank else {"other.txt", "x_model_states.pt"})


EXECUTED: list[str] = []


def _execute(*text: str) -> None:
    EXECUTED.extend(text)


class Reduced:
    """Executed by pickle's REDUCE."""

    def __reduce__(self) -> Any:
        return _execute, ("reduced",)


class Built:
    """Executed by pickle's BUILD."""

    def __setstate__(self, state: object) -> None:
        _execute("built")


def _zip_with_code(path: Path) -> None:
    torch.save({"module": Reduced()}, path)


def _built(path: Path) -> None:
    thing = Built()
    thing.__dict__["x"] = 1
    torch.save([thing], path)


def _bare(path: Path) -> None:
    path.write_bytes(pickle.dumps(Reduced()))


def _legacy(path: Path) -> None:
    torch.save({"module": Reduced()}, path, _use_new_zipfile_serialization=False)


def _with_name(path: Path) -> None:
    path.write_bytes(b"")
    torch.save({"module": os.system}, path)


@pytest.mark.parametrize("plant", [_zip_with_code, _built, _bare, _legacy, _with_name])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_with_code_is_refused_and_nothing_of_it_run(
    tmp_path: Path, plant: Callable[[Path], None], mmap: bool
) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    plant(path)
    with pytest.raises(UserError, match=rf"{path} (names .*, which no checkpoint holds|is damaged)"):
        read_state(path, mmap=mmap)
    if plant is _with_name:
        with pytest.raises(UserError, match=r"names (os|posix)\.system, which no checkpoint holds"):
            read_state(path, mmap=mmap)
    assert not EXECUTED


def _files_of(folder: Path, *, listed: bool, zero: int = 1) -> tuple[Path, Manifest]:
    """A checkpoint of one rank with files of the names that DeepSpeed gives."""
    checkpoint = folder / "step_3"
    checkpoint.mkdir()
    zero_name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    for name in ("mp_rank_00_model_states.pt", "rng_rank_0.pt", *([zero_name] if zero else [])):
        torch.save({"module": {"weight": torch.ones(200)}}, checkpoint / name)
    files = {path.name: file_sum(path) for path in checkpoint.iterdir()} if listed else {}
    manifest = manifest_of(layout={"world_size": 1, "tensor": 1, "zero_stage": zero}, files=files)
    write_manifest(checkpoint, manifest)
    return checkpoint, read_manifest(checkpoint)


@pytest.mark.parametrize("kind", ["mp_rank_00_model", "zero_pp_rank_0_mp_rank_00_optim"])
@pytest.mark.parametrize(
    ("damage", "listed", "message"),
    [
        ("flip", True, r"is damaged: its SHA-256 is not the one in checkpoint\.json"),
        ("cut", True, r"is damaged: it has [\d,]+ bytes and had [\d,]+"),
        ("cut", False, r"is damaged: torch cannot read it"),
        ("empty", True, "is damaged: it has 0 bytes"),
        ("empty", False, "is damaged: torch cannot read it"),
        ("gone", True, "is missing"),
        ("gone", False, "is missing"),
        ("code", True, "is damaged"),
        ("code", False, "names .*, which no checkpoint holds"),
        ("fifo", True, "is missing"),
        ("directory", False, "is missing"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, kind: str, damage: str, listed: bool, message: str) -> None:
    checkpoint, manifest = _files_of(tmp_path, listed=listed)
    check_files(checkpoint, manifest, rank=0, sums=True)
    path = checkpoint / f"{kind}_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.unlink()
    if damage in ("flip", "cut", "empty"):
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[damage])
    elif damage == "code":
        torch.save({"module": Reduced()}, path)
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage == "directory":
        path.mkdir()
    with pytest.raises(UserError, match=rf"{path} {message}"):
        check_files(checkpoint, manifest, rank=0, sums=True)
    assert not EXECUTED


def test_files_that_are_not_listed(tmp_path: Path) -> None:
    checkpoint, manifest = _files_of(tmp_path, listed=True)
    torch.save(Reduced(), checkpoint / "mine.pt")  # read by nobody
    check_files(checkpoint, manifest, rank=0, sums=True)
    torch.save(Reduced(), checkpoint / "mp_rank_zz_model_states.pt")  # DeepSpeed would find it
    with pytest.raises(
        UserError, match=r"mp_rank_zz_model_states\.pt is none of the files that checkpoint\.json lists"
    ):
        check_files(checkpoint, manifest, rank=0, sums=True)
    outside = replace(manifest, files=manifest.files | {"../../secret": [1]})
    (checkpoint / "mp_rank_zz_model_states.pt").unlink()
    with pytest.raises(UserError, match="secret is missing"):
        check_files(checkpoint, outside, rank=0, sums=True)
    assert not EXECUTED


@given(values=OBJECT, guards=JSON)
def test_the_same_run_may_go_on_with_other_guards_and_keys_that_are_new(values: dict[str, Any], guards: Any) -> None:
    manifest = manifest_of(determining=values | {"guards": None})
    determining = json.loads(json.dumps(values)) | {"guards": guards, "added later": None}
    check_resumable(manifest, determining=determining, layout=dict(manifest.layout), where=Path("step_3"))


@pytest.mark.parametrize(
    ("determining", "layout", "message"),
    [
        ({"a": {"b": 2, "c": None}}, {}, r"step_3 belongs to another run: a\.b is 1 there and 2 here\. .*another name"),
        ({"a": 5}, {}, r'a is \{"b": 1, "c": null\} there and 5 here'),
        ({"a": {"b": 2, "c": 3}}, {}, r"a\.b is 1 there and 2 here; a\.c is null there and 3 here"),
        (None, {"tensor": 2}, r"another layout: tensor is 1 there and 2 here\. To continue it, start the layout"),
        (None, {"world_size": 4, "zero_stage": 3}, r"world_size is 2 there and 4 here; zero_stage is 1 there and 3"),
    ],
)
def test_another_run_or_layout_is_refused(determining: Any, layout: dict[str, int], message: str) -> None:
    manifest = manifest_of(determining={"a": {"b": 1, "c": None}})
    with pytest.raises(UserError, match=message):
        check_resumable(
            manifest,
            determining=determining or manifest.determining,
            layout=manifest.layout | layout,
            where=Path("step_3"),
        )
