"""What pyproject.toml cannot say: the kernels' sources go into the package, and, when asked, the compiled kernels too.

MEGATRON_EXT_BUILD_KERNELS=cpu, cuda or cpu,cuda compiles ahead of time, for the CPU of this machine and the GPUs that
`megatron-ext kernels build` would compile for; without it they are compiled at first use. Such an installation needs
--no-build-isolation: the compilers are given the headers of the torch that is there.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))


def asked_for() -> list[Any]:
    """The backends to compile ahead of time."""
    from megatron_ext.ops.building.recipe import BACKENDS
    from megatron_ext.runtime.environment import AHEAD_VARIABLE, kernel_environment

    names = re.split(r"[,;\s]+", kernel_environment().ahead or "")
    wanted = [name for name in names if name]
    for name in wanted:
        if name not in BACKENDS:
            raise SystemExit(f"error: {AHEAD_VARIABLE} has {name!r}; write {' or '.join(BACKENDS)}, or both")
    return wanted


class BuildPy(build_py):  # type: ignore[misc]
    """Copies csrc, and what was compiled, into the package that is being built."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        package = Path(self.build_lib) / "megatron_ext"
        if not self.editable_mode:
            shutil.rmtree(package / "csrc", ignore_errors=True)
            shutil.copytree(ROOT / "csrc", package / "csrc")
        for backend in asked_for():
            self.announce(f"compiling the {backend} kernels", level=2)
            built = compiled(backend)
            if not self.editable_mode:  # a checkout takes it from the cache
                shutil.copytree(built, package / "ops" / "prebuilt" / backend, dirs_exist_ok=True)


def compiled(backend: Any) -> Path:
    """The folder of a library in the cache, built now where it is not there."""
    from megatron_ext.ops.building.builder import build_library, cached_library
    from megatron_ext.ops.building.recipe import recipe_for
    from megatron_ext.ops.building.toolchain import KernelsUnavailableError
    from megatron_ext.runtime.environment import kernel_environment

    environment = kernel_environment()
    try:
        recipe = recipe_for(backend, environment)
        library = cached_library(recipe, environment.cache) or build_library(
            recipe, environment.cache, jobs=environment.jobs
        )
    except KernelsUnavailableError as error:
        raise SystemExit(f"error: {error}") from error
    return library.path.parent


class CompiledDistribution(Distribution):  # type: ignore[misc]
    """Bound to a platform where kernels are compiled ahead of time."""

    def has_ext_modules(self) -> bool:
        """Whether there is machine code."""
        return bool(asked_for())


class Wheel(bdist_wheel):  # type: ignore[misc]
    """The kernels do not depend on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform that the wheel is for."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel}, distclass=CompiledDistribution)
