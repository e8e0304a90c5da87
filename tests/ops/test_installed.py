"""An installed package has the kernels' sources, builds them at first use, or brings them compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.ops.building.recipe import recipe_for
from megatron_ext.runtime.environment import kernel_environment

ROOT = Path(__file__).parents[2]

LOAD = """
from megatron_ext.ops.building.recipe import recipe_for
from megatron_ext.ops.building.recipe import source_folder
from megatron_ext.ops.loading import load_operators
from megatron_ext.runtime.environment import kernel_environment
library = load_operators("cpu")
print(source_folder())
print(library.path)
print(library.built_now)
"""


def installed(folder: Path, **environment: str) -> Path:
    """Build a wheel as an installer does and unpack it; the folder that stands for site-packages."""
    source = folder / "source"
    for name in ("megatron_ext", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "prebuilt")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = ["--no-deps", "--no-build-isolation", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(
        [*pip, "install", "--quiet", *target],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return folder / "site"


def load(site: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        capture_output=True,
        text=True,
        check=False,
        cwd=site.parent,
        env=os.environ | {"PYTHONPATH": str(site)} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed with its sources alone."""
    return installed(tmp_path_factory.mktemp("installed"))


@pytest.mark.usefixtures("fused")
def test_what_the_checkout_has_built_serves_the_installed_package(site: Path) -> None:
    sources, library, built = load(site)
    assert sources == str(site / "megatron_ext" / "csrc")
    key = recipe_for("cpu", kernel_environment()).key
    assert Path(library).parent == kernel_environment().cache / key, "the same sources have the same name"
    assert built == "False"


@pytest.mark.usefixtures("fused")
def test_kernels_compiled_by_the_installation_need_no_compiler(tmp_path: Path) -> None:
    site = installed(tmp_path, MEGATRON_EXT_BUILD_KERNELS="cpu")
    nothing = str(tmp_path / "nothing")
    _, library, _ = load(site, CXX=nothing, MEGATRON_EXT_KERNEL_CACHE=nothing)
    assert library == str(site / "megatron_ext" / "ops" / "prebuilt" / "cpu" / "libmegatron_ext_cpu.so")


@pytest.mark.slow
@pytest.mark.usefixtures("fused")
def test_an_installed_package_builds_at_first_use(site: Path, tmp_path: Path) -> None:
    _, library, built = load(site, MEGATRON_EXT_KERNEL_CACHE=str(tmp_path / "cache"))
    assert Path(library).is_relative_to(tmp_path / "cache")
    assert built == "True"


def test_a_backend_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="MEGATRON_EXT_BUILD_KERNELS has 'gpu'; write cpu or cuda"):
        installed(tmp_path, MEGATRON_EXT_BUILD_KERNELS="gpu")
