"""megatron-ext schema."""

import json

import pytest

from megatron_ext.cli.schema import command
from megatron_ext.config.schema import reference, run_schema
from megatron_ext.errors import UserError


@pytest.mark.parametrize("partial", [False, True])
def test_the_schema_is_printed_as_json(partial: bool, capsys: pytest.CaptureFixture[str]) -> None:
    command(partial=partial)
    assert json.loads(capsys.readouterr().out) == run_schema(partial=partial)


def test_the_page_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    command(markdown=True)
    assert capsys.readouterr().out == reference()
    with pytest.raises(UserError, match="--partial is about the JSON Schema"):
        command(markdown=True, partial=True)
