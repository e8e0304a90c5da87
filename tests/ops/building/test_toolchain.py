"""What is missing or unfit is said in one line, with what to do; and which architectures are compiled for."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.ops.building.toolchain import (
    Architecture,
    KernelsUnavailableError,
    Torch,
    choose_architectures,
    cpu_features,
    find_compiler,
    find_ninja,
    find_nvcc,
    find_torch,
    runs_on,
)
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


KNOWN = frozenset({"75", "80", "86", "89", "90", "100", "103", "120"})


def chosen(listed: str | None, *devices: tuple[int, int], known: frozenset[str] = KNOWN) -> list[str]:
    return [str(architecture) for architecture in choose_architectures(listed, devices, known)]


def test_the_list_rules_then_the_devices_then_the_default() -> None:
    assert chosen("9.0 8.0+PTX", (10, 0)) == ["80+PTX", "90"]
    assert chosen(None, (10, 0), (8, 6), (8, 6)) == ["86", "100"]
    assert chosen(None) == ["80", "90", "100+PTX"]
    assert chosen(None, known=frozenset({"80", "90"})) == ["80", "90+PTX"]


@pytest.mark.parametrize("listed", ["8.0;9.0a;10.0+PTX", " 8.0, 9.0a 10.0+PTX;", "10.0+PTX;10.0;8.0;9.0a"])
def test_separators_order_and_repetition_do_not_matter(listed: str) -> None:
    assert chosen(listed) == ["80", "90a", "100+PTX"]


def test_options_of_nvcc() -> None:
    assert Architecture("90a").options == ["-gencode", "arch=compute_90a,code=sm_90a"]
    assert Architecture("100", ptx=True).options[1] == "arch=compute_100,code=[sm_100,compute_100]"


@pytest.mark.parametrize(
    ("listed", "message"),
    [("Hopper", "'Hopper'"), ("90", "'90'"), ("8.0;", ""), ("7.0", "names 70 and this nvcc compiles for 75, 80")],
)
def test_what_cannot_be_is_named(listed: str, message: str) -> None:
    if not message:
        assert chosen(listed) == ["80"]
        return
    with pytest.raises(KernelsUnavailableError, match=message):
        chosen(listed)
    with pytest.raises(KernelsUnavailableError, match="this machine has 62"):
        chosen(None, (6, 2))


@given(st.lists(st.sampled_from(sorted(KNOWN)), min_size=1), st.sampled_from(sorted(KNOWN)))
def test_code_runs_on_its_major_version_from_its_minor_on_and_ptx_on_what_is_newer(
    compiled: list[str], device: str
) -> None:
    number = int(device)
    same = any(int(name) // 10 == number // 10 and int(name) <= number for name in compiled)
    assert runs_on(compiled, divmod(number, 10)) == same
    assert runs_on([f"{name}+PTX" for name in compiled], divmod(number, 10)) == any(int(n) <= number for n in compiled)


def test_specific_code_runs_on_its_own_device_alone() -> None:
    assert runs_on(["90a"], (9, 0))
    assert not runs_on(["90a"], (9, 1))
    assert not runs_on([], (9, 0))
