"""kernels build says what it built and where; kernels bench measures and writes a table or JSON."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_ext.cli import doctor
from megatron_ext.cli.kernels import kernels_app
from megatron_ext.errors import UserError
from megatron_ext.ops.building import recipe
from tests.ops.building.small_library import small_recipe

RUN = CliRunner()
QUICK = ["bench", "--sizes", "small", "--no-compile", "--rounds", "1", "--seconds", "0"]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """``kernels build --cpu`` of a library of three lines, into a cache of its own."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    made = small_recipe(tmp_path)
    monkeypatch.setattr(recipe, "recipe_for", lambda *_arguments: made)
    monkeypatch.setenv("MEGATRON_EXT_KERNEL_CACHE", str(tmp_path / "cache"))
    return lambda *options: RUN.invoke(kernels_app, ["build", "--cpu", *options], catch_exceptions=False).output


def test_build_says_what_is_new_and_where(small: Callable[..., str], tmp_path: Path) -> None:
    first = small()
    assert first.startswith("cpu: built in ")
    path = first.rsplit(": ", maxsplit=1)[1].strip()
    assert Path(path).is_file()
    assert Path(path).is_relative_to(tmp_path / "cache")
    assert small() == f"cpu: there already: {path}\n"
    assert small("--force").startswith("cpu: built in ")


def test_what_was_asked_for_and_cannot_be_is_an_error_and_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="is not installed"):
        RUN.invoke(kernels_app, ["build", "--cuda"], catch_exceptions=False)
    monkeypatch.setenv("MEGATRON_EXT_KERNEL_CACHE", str(tmp_path))
    finding = next(one for one in doctor.examine() if one.name == "cpu kernels")
    assert finding.found is None
    assert "until then PyTorch's own operations are used" in str(finding.remedy)


@pytest.mark.usefixtures("fused")
def test_bench_measures_every_operation() -> None:
    from megatron_ext.ops.bench.figures import OPERATIONS

    answer = json.loads(RUN.invoke(kernels_app, [*QUICK, "--json"], catch_exceptions=False).stdout)
    assert answer["device"]
    assert answer["copy_gigabytes_per_second"] > 0
    figures = answer["figures"]
    assert {figure["case"]["op"] for figure in figures} == set(OPERATIONS)
    for figure in figures:
        assert figure["ratios"]["torch"] > 0
    assert not any(one["failures"] for one in answer["measured"])


@pytest.mark.usefixtures("fused")
def test_bench_of_one_operation_as_a_table() -> None:
    lines = RUN.invoke(kernels_app, [*QUICK, "--op", "bias_gelu"], catch_exceptions=False).stdout.splitlines()
    assert lines[1].split() == ["operation", "direction", "us", "GB/s", "of", "copy", "/", "torch"]
    assert [line.split()[:4] for line in lines[2:]] == [
        ["bias_gelu", "64x256", "float32", "forward"],
        ["bias_gelu", "64x256", "float32", "backward"],
    ]


def test_bench_names_an_operation_that_there_is_not() -> None:
    with pytest.raises(UserError, match="--op gelu is none of layer_norm, "):
        RUN.invoke(kernels_app, ["bench", "--op", "gelu"], catch_exceptions=False)
