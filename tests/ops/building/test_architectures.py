"""TORCH_CUDA_ARCH_LIST, the devices, or the default; and what runs where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.ops.building.architectures import Architecture, choose_architectures, runs_on
from megatron_ext.ops.building.problem import KernelsUnavailableError

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
