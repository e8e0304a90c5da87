"""What is missing or unfit is said in one line, with what to do; programs are stood in for by scripts."""

from pathlib import Path

import pytest

from megatron_ext.ops.building.problem import KernelsUnavailableError
from megatron_ext.ops.building.toolchain import Torch, cpu_features, find_compiler, find_ninja, find_nvcc, find_torch
from megatron_ext.runtime.environment import KernelEnvironment, kernel_environment


def environment(*, compiler: str = "g++", cuda_home: Path | None = None) -> KernelEnvironment:
    return KernelEnvironment(Path("cache"), compiler, cuda_home, None, 1, None)


def program(path: Path, says: str, *, status: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def torch_of(cuda: str | None) -> Torch:
    return Torch(Path("torch"), "2.13.0", cuda)


def test_a_compiler_that_is_missing_old_or_broken(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match="no-such-compiler is not installed; install g\\+\\+"):
        find_compiler(environment(compiler="no-such-compiler"))
    with pytest.raises(KernelsUnavailableError, match=r"8\.3\.0 is too old .* set CXX"):
        find_compiler(environment(compiler=program(tmp_path / "old", "8.3.0")))
    with pytest.raises(KernelsUnavailableError, match="does not run"):
        find_compiler(environment(compiler=program(tmp_path / "broken", "no", status=1)))
    with pytest.raises(KernelsUnavailableError, match="says no version"):
        find_compiler(environment(compiler=program(tmp_path / "silent", "hello")))
    assert find_compiler(environment(compiler=program(tmp_path / "new", "14"))).version == (14,)


def test_an_nvcc_that_is_missing_old_or_of_another_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nvcc(release: str) -> KernelEnvironment:
        program(tmp_path / release / "bin" / "nvcc", f"Cuda compilation tools, release {release}, V{release}.1")
        return environment(cuda_home=tmp_path / release)

    assert find_nvcc(nvcc("13.0"), torch_of("13.2")).version == (13, 0)
    assert find_nvcc(nvcc("12.4"), torch_of(None)).version == (12, 4)
    with pytest.raises(
        KernelsUnavailableError, match=r"of CUDA 12\.4 and torch 2\.13\.0 of CUDA 13\.0; install the CUDA 13"
    ):
        find_nvcc(nvcc("12.4"), torch_of("13.0"))
    with pytest.raises(KernelsUnavailableError, match=r"11\.2 is too old"):
        find_nvcc(nvcc("11.2"), torch_of(None))
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(KernelsUnavailableError, match=r"nvcc is not installed; install the CUDA 13\.0 toolkit"):
            find_nvcc(environment(), torch_of("13.0"))


def test_ninja_is_looked_for_beside_python_then_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(KernelsUnavailableError, match="pip install ninja"):
        find_ninja()
    program(tmp_path / "bin" / "ninja", "1.11.0")
    assert find_ninja().version == (1, 11, 0)
    program(tmp_path / "ninja", "1.12.1.git")
    assert find_ninja().version == (1, 12, 1)


def test_torch_is_looked_at_without_importing_it() -> None:
    import torch

    found = find_torch()
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    assert found.major == 2


def test_the_environment_has_defaults_and_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEGATRON_EXT_KERNEL_CACHE", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    plain = kernel_environment()
    assert plain.cache == Path.home() / ".cache/megatron-ext/kernels"
    assert (plain.compiler, plain.cuda_home, plain.architectures) == ("g++", None, None)
    assert plain.jobs >= 1
    monkeypatch.setenv("MEGATRON_EXT_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " 9.0 ")
    assert (kernel_environment().cache, kernel_environment().jobs) == (tmp_path, 3)
    assert kernel_environment().architectures == "9.0"


def test_features_of_the_cpu_are_instruction_sets() -> None:
    features = cpu_features()
    assert features
    assert not features & {"constant_tsc", "hypervisor", "vmx", "svm"}
