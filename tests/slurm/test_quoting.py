"""Any text as a word of bash, read back by bash; values of #SBATCH lines (sbatch reads them in test_sbatch.py)."""

import os
import subprocess

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.slurm.quoting import directive, word, words

TEXTS = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@given(st.lists(TEXTS, min_size=1, max_size=20))
@example(["", "'", "\\", "\n", "$'\\n'", "a\x017b", "\x7f\\'", "-n", "!!", "~", "*", "\udcff"])
def test_bash_reads_a_word_as_the_text_it_was_made_from(texts: list[str]) -> None:
    line = words(texts)
    assert "\n" not in line
    done = subprocess.run(
        ["bash"], input=os.fsencode(f"printf '%s\\0' {line}"), capture_output=True, check=True, cwd="/"
    )
    assert [os.fsdecode(part) for part in done.stdout.split(b"\0")[:-1]] == texts


def test_plain_text_stays_readable() -> None:
    assert word("/data/run-1") == "/data/run-1"
    assert word("a b") == "'a b'"
    assert word("a\nb") == "$'a\\012b'"
    assert directive("job-name", "slw-seed1") == "#SBATCH --job-name=slw-seed1"
    assert directive("comment", 'a "b" \\') == '#SBATCH --comment="a \\"b\\" \\\\"'
    assert directive("requeue") == "#SBATCH --requeue"


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(UserError, match="null character"):
        word("a\0b")
    with pytest.raises(UserError, match=r"--comment is 'a\\nb': SLURM takes no line breaks"):
        directive("comment", "a\nb")
    with pytest.raises(UserError, match="longer than sbatch's 1000 bytes"):
        directive("comment", "é" * 501)
