"""The machines that can run kernels; the fixture ``backend`` has one parameter for each."""

from collections.abc import Callable
from functools import partial

from tests.kernels.emulator.backend import emulator_backend
from tests.kernels.interface import KernelBackend, KernelError
from tests.kernels.library import cpu_backend, cuda_backend
from tests.kernels.ptx.backend import ptx_backend

__all__ = ["BACKENDS", "KernelBackend", "KernelError"]

# Each makes its backend or raises ``CannotBuildError`` with the reason why it cannot be had here.
BACKENDS: dict[str, Callable[[], KernelBackend]] = {
    **{f"emulator-{order}": partial(emulator_backend, order) for order in ("forward", "reverse", "random")},
    "cpu-serial": partial(cpu_backend, threads=False),
    "cpu-threads": partial(cpu_backend, threads=True),
    "cuda": cuda_backend,
    **{f"ptx-{architecture}": partial(ptx_backend, architecture) for architecture in (80, 90, 100)},
}
