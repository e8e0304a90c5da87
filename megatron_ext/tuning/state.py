"""tune.json: what has been found so far, so that a search goes on where it stopped."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.base import describe_differences
from megatron_ext.errors import UserError
from megatron_ext.runtime.files import replace_text
from megatron_ext.tuning.search import Candidate
from megatron_ext.tuning.verdict import Point, Verdict

FILE_NAME = "tune.json"
_FORMAT = 1


@dataclass(frozen=True)
class ProbeResult:
    """A finished probe."""

    candidate: Candidate
    verdict: Verdict
    points: tuple[Point, ...]
    """Its validations."""


def read_results(folder: Path, identity: dict[str, Any]) -> dict[Candidate, ProbeResult]:
    """The finished probes in ``folder``, in the order in which they were run; none where nothing was tuned yet.

    Raises:
        UserError: the file is damaged, or its probes belong to another run or were judged by other settings.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise UserError(f"{path} has format {content['format']}, this version reads format {_FORMAT}")
        results = [_from_json(item) for item in content["probes"]]
        there = content["identity"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): remove it, or choose another --output") from error
    # Both through JSON, where tuples are lists.
    changes = describe_differences(there, json.loads(json.dumps(identity)))
    if changes:
        raise UserError(
            f"{path} holds probes of another search: {changes}. Choose another --output, or restore those values"
        )
    return {result.candidate: result for result in results}


def write_results(folder: Path, identity: dict[str, Any], results: dict[Candidate, ProbeResult]) -> None:
    """Write all finished probes; a reader sees the old file or the new one."""
    content = {"format": _FORMAT, "identity": identity, "probes": [_to_json(result) for result in results.values()]}
    replace_text(folder / FILE_NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _to_json(result: ProbeResult) -> dict[str, Any]:
    verdict = result.verdict
    return {
        "start": result.candidate.start,
        "duration_steps": result.candidate.duration,
        "fluctuated_at": verdict.fluctuated_at,
        "worst_ratio": _number_to_json(verdict.worst_ratio),
        "tokens": verdict.tokens,
        "validations": [[point.step, _number_to_json(point.perplexity)] for point in result.points],
    }


def _from_json(item: dict[str, Any]) -> ProbeResult:
    return ProbeResult(
        candidate=Candidate(int(item["start"]), int(item["duration_steps"])),
        verdict=Verdict(
            fluctuated_at=item["fluctuated_at"], worst_ratio=float(item["worst_ratio"]), tokens=int(item["tokens"])
        ),
        points=tuple(Point(int(step), float(perplexity)) for step, perplexity in item["validations"]),
    )


def _number_to_json(value: float) -> float | str:
    """The number, or its spelling ("inf", "nan"), for which JSON has none."""
    return value if math.isfinite(value) else str(value)
