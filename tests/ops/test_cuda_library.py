"""The CUDA library is built by nvcc, loads beside a CPU build of torch, and says clearly that there is no driver.

Kernels here only return what CUDA returns without a driver; the real ones take minutes (marked slow).
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.ops.building.builder import Library, build_library
from megatron_ext.ops.building.recipe import Recipe, recipe_for, source_folder
from megatron_ext.ops.building.toolchain import Architecture, KernelsUnavailableError
from megatron_ext.ops.loading import find_library
from megatron_ext.runtime.environment import kernel_environment

_INSUFFICIENT_DRIVER = 35

LOOK = """
import ctypes, sys
import torch
from megatron_ext.ops.loading import is_loaded, load_operators
load_operators("cpu")
assert is_loaded("cpu") and not is_loaded("cuda")
library = ctypes.CDLL(sys.argv[1])
assert is_loaded("cuda")
library.mx_cuda_error.restype = ctypes.c_char_p
f, i = ctypes.c_float, ctypes.c_int64
status = library.mx_cuda_bias_gelu_forward(0, 0, None, None, None, 0, i(4), i(4), None)
print(status, library.mx_cuda_error(status or 35).decode())
x = torch.randn(2, 4)
try:
    torch.ops.megatron_ext.bias_gelu_forward.default._op_dk(torch._C.DispatchKey.CUDA, x, None, False)
except RuntimeError as error:
    print(error)
print(torch.ops.megatron_ext.bias_gelu_forward(x, None, False).shape)
"""


def recipe() -> Recipe:
    try:
        made = recipe_for("cuda", kernel_environment(), devices=[(9, 0)])
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    return replace(made, architectures=(Architecture("90"),))


def look(library: Path) -> list[str]:
    """What a fresh process says that loads both libraries."""
    done = subprocess.run([sys.executable, "-c", LOOK, str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def stand_ins(folder: Path) -> Path:
    """csrc with kernels that do nothing: every function of abi.h, as it is declared there."""
    real = source_folder()
    for name in ("common", "bindings"):
        (folder / name).symlink_to(real / name)
    (folder / "cuda").mkdir()
    text = (real / "common" / "abi.h").read_text(encoding="utf-8")
    start, end = text.index("#define MX_DECLARE"), text.index("#ifdef __cplusplus")
    define = (
        f"#define MX_DECLARE(NAME, ...) int mx_cuda_##NAME(__VA_ARGS__, void*) {{ return {_INSUFFICIENT_DRIVER}; }}\n"
    )
    body = (text[:start] + define + text[end:]).replace(
        "int64_t mx_cuda_partitions(int64_t rows, int64_t cols);",
        "int64_t mx_cuda_partitions(int64_t, int64_t) { return 1; }",
    )
    (folder / "cuda" / "nothing.cu").write_text(body, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, fused: None) -> Library:  # noqa: ARG001 - the other library
    folder = tmp_path_factory.mktemp("cuda")
    made = replace(recipe(), folder=stand_ins(folder), sources="nothing")
    return build_library(made, folder / "cache", jobs=2)


def test_it_loads_without_a_gpu_and_says_what_is_missing(library: Library) -> None:
    status, refusal, shape = look(library.path)
    assert status.startswith(f"{_INSUFFICIENT_DRIVER} there is no NVIDIA driver here, or it is too old")
    assert refusal == "megatron_ext::bias_gelu_forward: x is not on a device of type cuda"
    assert shape == "torch.Size([2, 4])", "the CPU's kernels still answer"


def test_one_symbol_alone_is_left_to_a_cuda_build_of_torch(library: Library) -> None:
    names = subprocess.run(["nm", "-D", str(library.path)], capture_output=True, text=True, check=True).stdout
    weak = {line.split()[-1] for line in names.splitlines() if " w " in line and "aoti" in line}
    assert weak == {"aoti_torch_get_current_cuda_stream"}
    assert "mx_cuda_layer_norm_forward" in names
    assert library.architectures == ("90",)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make test-gpu launches the kernels")
def test_the_real_kernels_load_and_say_that_there_is_no_driver(fused: None) -> None:  # noqa: ARG001 - as above
    recipe()
    found = find_library("cuda")
    assert found is not None
    assert look(found.path)[0].startswith(f"{_INSUFFICIENT_DRIVER} there is no NVIDIA driver")
