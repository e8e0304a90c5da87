"""How ranks come to know one secret that nobody else knows."""

import json
import os
import stat
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from megatron_ext.errors import UserError
from megatron_ext.runtime import secret as module
from megatron_ext.runtime.environment import SECRET, RankInfo
from megatron_ext.runtime.failure import Failure, failure_of
from megatron_ext.runtime.secret import SealedStore, run_secret, seal, unseal

MAIN, OTHER = (RankInfo(rank, rank, 2, 2, "127.0.0.1", 1) for rank in (0, 1))


def nothing_to_wait_for(key: str) -> None:
    assert key == "secret"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    monkeypatch.setattr(module, "_SHOWS_UP_SECONDS", 0.2)


def test_ranks_without_a_launcher_share_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    store, run = HashStore(), tmp_path / "run"
    umask = os.umask(0)
    try:
        with run_secret(MAIN, store, run, nothing_to_wait_for) as mine:
            (path,) = run.iterdir()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with run_secret(OTHER, store, run, nothing_to_wait_for) as other:
                assert other == mine
            assert path.exists()
    finally:
        os.umask(umask)
    assert not list(run.iterdir())
    assert len(mine) == 64
    assert store.get("secret") == path.name.encode(), "nothing but the name lies in the store"
    assert mine.decode() not in path.name
    with run_secret(MAIN, HashStore(), run, nothing_to_wait_for) as another:
        assert another != mine


def test_a_launcher_s_secret_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    monkeypatch.setenv(SECRET, "0123456789abcdef")
    for info in (MAIN, OTHER):
        with run_secret(info, store, tmp_path, nothing_to_wait_for) as given:
            assert given == b"0123456789abcdef"
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv(SECRET)
    with (
        pytest.raises(UserError, match=f"{SECRET} is not set for rank 1"),
        run_secret(OTHER, store, tmp_path, nothing_to_wait_for),
    ):
        pass
    monkeypatch.setenv(SECRET, "short")
    with pytest.raises(UserError, match="has 5 characters"), run_secret(MAIN, store, tmp_path, nothing_to_wait_for):
        pass


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".secret-0123456789abcdef", "\xff", ""])
def test_a_stranger_s_word_leads_to_no_other_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("0" * 64)
    (tmp_path / "run").mkdir()
    store = HashStore()
    store.set("secret", name)
    with (
        pytest.raises(UserError, match="cannot be read on host") as raised,
        run_secret(OTHER, store, tmp_path / "run", nothing_to_wait_for),
    ):
        pass
    assert "0000" not in str(raised.value)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="see output_dir"),
        run_secret(MAIN, HashStore(), tmp_path / "file", nothing_to_wait_for),
    ):
        pass


def test_a_store_gives_back_what_ranks_have_put_there_and_nothing_else() -> None:
    plain = HashStore()
    store = SealedStore(plain, b"secret")
    store.set("members/0", json.dumps({"pid": 1}))
    assert json.loads(store.get("members/0")) == {"pid": 1}
    stranger = SealedStore(plain, b"guess")
    for forged in ("", "{}", "\xff" * 64, plain.get("members/0").decode()):
        plain.set("members/1", forged)
        with pytest.raises(UserError, match="not written by a rank of this run"):
            store.get("members/1")
    stranger.set("members/0", json.dumps({"pid": 2}))
    with pytest.raises(UserError, match="not written by a rank of this run"):
        store.get("members/0")


def test_a_seal_holds_for_its_context() -> None:
    sealed = seal(b"secret", "a", b"b\0c")
    assert unseal(b"secret", "a", sealed) == b"b\0c"
    for secret, context in ((b"secret", "a\0b"), (b"secret", ""), (b"", "a")):
        with pytest.raises(ValueError, match="not sealed"):
            unseal(secret, context, sealed)


def test_no_failure_is_a_success() -> None:
    for code in (0, None, 75, "text", 2):
        assert failure_of(SystemExit(code), 1).status == (2 if code == 2 else 1)
    with pytest.raises(ValueError, match="exit status 1 or 2"):
        Failure(1, "FORGED by a stranger", 0, "error")
    assert len(json.dumps(failure_of(UserError("x" * 10**6), 1).text)) < 40_000
