"""Device code of every kernel for every architecture: it compiles, spills nothing, and keeps to the table."""

import pytest

from tests.kernels.building import CannotBuildError
from tests.kernels.static.device_code import (
    ARCHITECTURES,
    Accesses,
    Limits,
    Resources,
    accesses,
    limits_of,
    parse_listing,
    parse_report,
    read_table,
    resources,
)

TABLE = read_table()
REWRITE = "`python -m tests.kernels.static` rewrites the table, if this is meant"


# All but one are slow: what is right for one is mostly right for all.
@pytest.fixture(params=[pytest.param(name, marks=() if name == "90" else pytest.mark.slow) for name in ARCHITECTURES])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def taken(architecture: str) -> dict[str, Resources]:
    try:
        return resources(architecture)
    except CannotBuildError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def accessed(architecture: str) -> dict[str, Accesses]:
    try:
        return accesses(architecture)
    except CannotBuildError as missing:
        pytest.skip(str(missing))


def test_nothing_is_spilled(taken: dict[str, Resources]) -> None:
    assert {name: each for name, each in taken.items() if each.stack or each.spilled} == {}


def test_registers_keep_to_the_table(taken: dict[str, Resources]) -> None:
    assert set(taken) == set(TABLE), REWRITE
    over = {name: (each.registers, TABLE[name].registers) for name, each in taken.items()}
    assert {name: pair for name, pair in over.items() if pair[0] > pair[1]} == {}, REWRITE


def test_no_local_memory(accessed: dict[str, Accesses]) -> None:
    assert {name: each.local for name, each in accessed.items() if each.local} == {}


def test_memory_is_accessed_16_bytes_at_a_time(accessed: dict[str, Accesses]) -> None:
    narrow = [
        name
        for name, each in accessed.items()
        if (TABLE[name].wide_loads and not each.wide_loads) or (TABLE[name].wide_stores and not each.wide_stores)
    ]
    assert narrow == []


def test_kernels_on_vectors_are_in_the_table_as_such() -> None:
    """A kernel whose vectors have several elements is named so, and writes as many at once as it reads."""
    vectors = [name for name in TABLE if any(f", {width}" in name for width in (4, 8)) and ", 1," not in name]
    assert len(vectors) > 20
    assert [name for name in vectors if not TABLE[name].wide_loads] == []
    # The backward pass of bias and dropout writes dx only with dropout, and still 16 bytes at once.
    assert [name for name in vectors if not TABLE[name].wide_stores] == []


REPORT = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 33 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""


def test_a_report_with_spills_is_read() -> None:
    assert parse_report(REPORT) == {"_Z1av": Resources(33, 8, 16), "_Z1bv": Resources(8, 0, 0)}


LISTING = """
	.section	.text._Z1av,"ax",@progbits
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/                   LDL R4, [R1] ;
        /*0020*/                   STG.E desc[UR4][R2.64], R4 ;
	.section	.text._Z1bv,"ax",@progbits
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0010*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0020*/                   STL.64 [R1], R4 ;
        /*0030*/                   STL.64 [R1+8], R4 ;
"""


def test_a_listing_with_local_memory_is_read() -> None:
    assert parse_listing(LISTING) == {"_Z1av": Accesses(1, 0, 1), "_Z1bv": Accesses(0, 1, 2)}


def test_the_table_forgets_no_wide_access_by_itself() -> None:
    narrow, wide = Accesses(0, 0, 0), Accesses(2, 2, 0)
    assert limits_of([Resources(33, 0, 0)], [wide], None) == Limits(40, True, True)
    assert limits_of([Resources(40, 0, 0), Resources(41, 0, 0)], [wide, narrow], None) == Limits(48, False, False)
    assert limits_of([Resources(8, 0, 0)], [narrow], Limits(8, True, False)) == Limits(8, True, False)
