"""Files are replaced whole, or not at all."""

from pathlib import Path

import pytest

from megatron_ext.runtime.files import publish_directory, replace_text, replacing


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "name"
    replace_text(path, "old")
    replace_text(path, "né")
    assert path.read_bytes() == "né".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_content_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "name"
    replace_text(path, "old")
    with replacing(path) as file:
        file.write(b"half of the new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "half of the new"


def test_an_error_inside_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "name"
    replace_text(path, "old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_text(tmp_path / "missing" / "name", "text")


def test_a_directory_is_published_whole_and_once(tmp_path: Path) -> None:
    for number in (1, 2):
        source = tmp_path / f"partial-{number}"
        (source / "inner").mkdir(parents=True)
        (source / "inner" / "name").write_text(str(number))
        assert publish_directory(source, tmp_path / "final") is (number == 1)
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "inner" / "name").read_text() == "1"


def test_a_directory_that_cannot_be_published_stays(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    with pytest.raises(FileNotFoundError):
        publish_directory(tmp_path / "partial", tmp_path / "missing" / "final")
    assert (tmp_path / "partial").is_dir()
