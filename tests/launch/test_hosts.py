"""Hostfiles, and what --include and --exclude leave of them; compared with DeepSpeed's own reading."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_inclusion_exclusion
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.launch.hosts import Host, choose_hosts, read_hostfile

HOSTS = [Host("n1", (0, 1)), Host("n2", (0, 1, 2)), Host("gpu-3.local", (0,))]


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# all of them\n\nn2 slots=2   # the fast one\nn1\tslots=1\n")
    assert read_hostfile(path) == [Host("n2", (0, 1)), Host("n1", (0,))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n1 slots=2\nn2\n", "hosts:2: 'n2' is not of the form"),
        ("n1 slots=0\n", "hosts:1: 'n1 slots=0'"),
        ("n1 slots=-1\n", "hosts:1"),
        ("n1 slots=2 n2 slots=2\n", "hosts:1"),
        ("n1;reboot slots=2\n", "hosts:1"),
        ("-oProxyCommand=x slots=1\n", "hosts:1"),
        ("n1 slots=1\nn1 slots=2\n", "hosts:2: host n1 is named a second time"),
        ("# none\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_one_message(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_hostfile(path)


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


NAMES = st.sampled_from(["n1", "n2", "gpu-3.local"])
SLOTS = {host.name: host.slots for host in HOSTS}


@st.composite
def choices(draw: st.DrawFn) -> str:
    parts = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        slots = draw(st.lists(st.sampled_from(SLOTS[name]), max_size=3, unique=True))
        parts.append(f"{name}:{','.join(map(str, slots))}" if slots else name)
    return "@".join(parts)


@given(choices(), st.booleans())
def test_a_choice_is_the_one_that_deepspeed_makes(text: str, include: bool) -> None:
    offered = {host.name: len(host.slots) for host in HOSTS}
    theirs = parse_inclusion_exclusion(offered, text if include else "", "" if include else text)
    try:
        ours = choose_hosts(HOSTS, include=text if include else "", exclude="" if include else text)
    except UserError:
        ours = []
    assert {host.name: list(host.slots) for host in ours} == {name: sorted(slots) for name, slots in theirs.items()}
    assert [host.name for host in ours] == list(theirs)


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        ("n9", "", "no host n9; it has n1, n2, gpu-3.local"),
        ("n1:5", "", "host n1 has no slot 5"),
        ("n1:a", "", "'n1:a' is not of the form"),
        ("n1", "n2", "exclude each other"),
        ("", "n1@n2@gpu-3.local", "leaves no host"),
    ],
)
def test_a_bad_choice_is_one_message(include: str, exclude: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_hosts(HOSTS, include=include, exclude=exclude)
