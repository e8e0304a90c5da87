"""What a stranger relies on: bounds, package data, make targets, CI, and documents whose links and commands exist."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from typer.testing import CliRunner

import megatron_ext
from megatron_ext.cli.app import app

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BOUNDS: Any = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["bounds"]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))


def make(*arguments: str) -> str:
    """What ``make`` would do or does, in the repository root."""
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    bounds = BOUNDS(ROOT / "pyproject.toml", tuple(PROJECT["optional-dependencies"]))
    assert {"torch", "deepspeed", "megatron-core", "transformers", "pytest"} <= set(bounds)
    for name, (low, high, _) in bounds.items():
        assert Version(low) < Version(high), name


def test_a_dependency_without_a_bound_is_refused(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\ndependencies = ["numpy>=2"]\noptional-dependencies = {}\n')
    with pytest.raises(ValueError, match="numpy>=2"):
        BOUNDS(pyproject, ())


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == megatron_ext.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_a_built_wheel_holds_modules_presets_and_the_typing_marker(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("megatron_ext", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_ext").rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_ext/config/presets").glob("*.json")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_ext/launch/templates").iterdir()}
    assert wanted <= held, wanted - held
    assert "megatron_ext/py.typed" in held
    assert "megatron_ext/csrc/common/abi.h" in held
    assert any(name.endswith("entry_points.txt") for name in held)


def test_make_offers_its_targets() -> None:
    described = make("help")
    targets = "demo test test-fast test-attack golden check test-slow test-gpu test-lowest test-newest bench clean venv"
    for target in targets.split():
        assert re.search(rf"\b{target}\b", described), target


def test_a_second_make_installs_nothing(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    assert "pip" in make("--dry-run", "test", f"VENV={venv}")
    (venv / "bin").mkdir(parents=True)
    for name in ("bin/python", ".installed", ".installed-demo"):
        (venv / name).touch()
    assert "pip" not in make("--dry-run", "test", f"VENV={venv}")
    os.utime(venv / ".installed", (1, 1))  # older than pyproject.toml
    assert "--editable" in make("--dry-run", "test", f"VENV={venv}")


def test_torch_is_installed_before_the_package_which_is_built_against_it(tmp_path: Path) -> None:
    steps = make("--dry-run", "venv", f"VENV={tmp_path}/venv")
    assert 0 < steps.index(" torch") < steps.index("--no-build-isolation --editable")


def test_without_a_gpu_torch_is_the_pinned_version_within_our_bounds(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    # Without what the command line of a make that runs these tests set.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "TORCH")}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    low, high, _ = BOUNDS(ROOT / "pyproject.toml", ())["torch"]
    command = ["make", "--dry-run", "venv", f"VENV={tmp_path}/venv"]

    def plan() -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout

    pinned = re.search(r" torch==(\S+)", plan())
    assert pinned is not None
    assert Version(low) <= Version(pinned[1]) < Version(high)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    assert f"'torch>={low},<{high}'" in plan()


def test_ci_script_is_executable_and_valid_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_files_are_tidied_and_those_of_a_golden_run_left_alone(tmp_path: Path) -> None:
    golden, whole, untidy = (tmp_path / name for name in ("tests/golden/run-0.1/log.txt", "whole.txt", "untidy.txt"))
    golden.parent.mkdir(parents=True)
    golden.write_bytes(b"a \n\n")
    whole.write_bytes(b"a\n")
    untidy.write_bytes(b"a \r\n\tb\n\n")
    command = [sys.executable, str(ROOT / ".ci" / "tidy.py"), "--fix", "whole.txt", "untidy.txt"]
    command.append(golden.relative_to(tmp_path).as_posix())
    done = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False) for _ in range(2)]
    assert [each.returncode for each in done] == [1, 0]
    assert done[0].stdout.startswith("untidy.txt: ")
    assert untidy.read_bytes() == b"a\n\tb\n"
    assert golden.read_bytes() == b"a \n\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


def test_modules_and_paths_that_documents_name_exist() -> None:
    folders = "benchmarks|configs|csrc|docs|examples|launch|megatron_ext|tests|[.]ci"
    named = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        named |= set(re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`", text))
        named |= set(re.findall(rf"`((?:{folders})/[a-z_0-9./-]*)`", text))  # without those that hold a NAME
    assert len(named) > 20
    for name in sorted(named - {"megatron_ext/a/b.py", "tests/a/test_b.py", "__init__.py"}):
        assert (ROOT / "megatron_ext" / name).is_file() or (ROOT / name).exists(), name


def shell_lines(document: Path) -> list[str]:
    """Lines of the document's fenced shell blocks, continuations joined."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_that_documents_name_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for line in shell_lines(document):
        if line.startswith("make "):
            assert line.split()[1] in targets, line


def test_commands_that_the_readme_shows_exist_with_their_options() -> None:
    lines = [line.split("#")[0] for line in shell_lines(ROOT / "README.md") if "megatron-ext " in line]
    assert lines
    for line in lines:
        words = line.partition("megatron-ext ")[2].split()
        path = [word for word in words[:2] if not word.startswith(("-", "/")) and "." not in word and "=" not in word]
        path = path[: 2 if path[0] in {"tokenizer", "experiment"} else 1]
        shown = CliRunner().invoke(app, [*path, "--help"])
        assert shown.exit_code == 0, f"{line}: {shown.output}"
        for option in (word for word in words if word.startswith("--")):
            assert option.split("=")[0] in shown.output, f"{line}: no {option}"


def test_configs_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"\bconfigs/[\w./-]+\.json\b", text)):
        assert (ROOT / name).is_file(), name


def test_the_config_examples_of_the_readme_are_valid(tmp_path: Path) -> None:
    from megatron_ext.config.loading import load_config

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    whole, *parts = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL))
    path = tmp_path / "run.json"
    for sections in ({}, *parts):  # the first one is a run; the others are sections of it
        path.write_text(json.dumps(whole | sections), encoding="utf-8")
        assert load_config(path).name == whole["name"]
