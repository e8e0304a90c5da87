"""megatron-ext schema."""

import json

import pytest

from megatron_ext.cli.schema import command
from megatron_ext.config.schema import run_schema


@pytest.mark.parametrize("partial", [False, True])
def test_the_schema_is_printed_as_json(partial: bool, capsys: pytest.CaptureFixture[str]) -> None:
    command(partial=partial)
    assert json.loads(capsys.readouterr().out) == run_schema(partial=partial)
