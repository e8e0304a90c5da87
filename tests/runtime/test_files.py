"""Files are replaced, and directories published, whole or not at all."""

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


def directory(path: Path, text: str) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(text)
    return path


def content(path: Path) -> str:
    return (path / "inner" / "file").read_text()


def test_a_directory_gets_its_name_and_one_that_comes_second_is_dropped(tmp_path: Path) -> None:
    target = tmp_path / "name"
    assert publish_directory(directory(tmp_path / "first", "first"), target)
    assert not publish_directory(directory(tmp_path / "second", "second"), target)
    assert content(target) == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_is_not_kept_is_replaced(tmp_path: Path) -> None:
    target, asked = directory(tmp_path / "name", "damaged"), list[str]()

    def keep(there: Path) -> bool:
        asked.append(content(there))
        return content(there) == "whole"

    assert publish_directory(directory(tmp_path / "first", "whole"), target, keep=keep)
    assert not publish_directory(directory(tmp_path / "second", "second"), target, keep=keep)
    assert asked == ["damaged", "whole"]
    assert content(target) == "whole"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_place_of_a_directory_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "name").touch()
    with pytest.raises(NotADirectoryError):
        publish_directory(directory(tmp_path / "first", "first"), tmp_path / "name")
    assert content(tmp_path / "first") == "first"
