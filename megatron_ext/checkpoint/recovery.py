"""What happens to checkpoints where something went wrong: an older one is used, steps are given up, a save failed.

Imported only then, or where a run finds checkpoints. No torch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint.store import complete_checkpoints, free_name, name_latest, remove, step_of
from megatron_ext.checkpoint.verify import OtherRunError
from megatron_ext.errors import UserError
from megatron_ext.runtime.log import LOGGER

if TYPE_CHECKING:
    from megatron_ext.runtime.process_group import Processes

_WRITER_SIGNS = ("inline_container", "iostream", "PytorchStreamWriter", "No space left")


def choose_whole(
    found: Sequence[Path], check: Callable[[Path], None], *, processes: "Processes", fallback: bool
) -> Path:
    """The newest checkpoint that every rank finds whole. Called by all ranks, with the same ``found``, oldest first.

    Newer ones are set aside once an older one is found to be whole.

    Args:
        found: At least one.
        check: Raises UserError where this rank cannot use a checkpoint.
        processes: The ranks.
        fallback: Whether to look further where the newest is not whole.

    Raises:
        UserError: none is whole; nothing was renamed. Or one could not be renamed.
    """
    problems: dict[Path, tuple[str, bool]] = {}
    for path in reversed(found):
        problem = _problem(path, check, processes)
        if problem is None:
            break
        problems[path] = problem
        if not fallback:
            raise UserError(
                f"{problem[0]}; move {path} away to continue from an older one (checkpoint.fallback is false)"
            )
    else:
        message, other_run = problems[found[-1]]
        # Another config, most often: all of them are whole.
        rest = "" if other_run else f"; no other checkpoint in {found[-1].parent} can be used: remove it to begin anew"
        raise UserError(message + rest)
    with processes.failing_together():
        if processes.info.is_main:
            _set_aside(problems)
    return path


def _problem(checkpoint: Path, check: Callable[[Path], None], processes: "Processes") -> tuple[str, bool] | None:
    """What keeps any rank from using it, and whether that is only that it is another run's."""
    own: tuple[str, bool] | None = None
    try:
        check(checkpoint)
    except OtherRunError as error:
        own = str(error), True
    except (UserError, OSError) as error:
        own = str(error), False
    found: list[Any] = [problem for problem in processes.gather(own) if problem is not None]
    return found[0] if found else None


def _set_aside(problems: dict[Path, tuple[str, bool]]) -> None:
    for path, (problem, _) in problems.items():
        try:
            aside = path.rename(free_name(path))
        except OSError as error:
            raise UserError(f"{problem}; and it could not be renamed ({error}): move it away") from error
        LOGGER.warning("%s; set aside as %s", problem, aside.name)


def drop_after(directory: Path, checkpoint: Path) -> list[Path]:
    """Remove the complete checkpoints that are newer than ``checkpoint``; return what was removed.

    The newest goes first, so that a process killed in between leaves a run that continues from one of them.
    """
    removed = [path for path in complete_checkpoints(directory) if step_of(path) > step_of(checkpoint)][::-1]
    for path in removed:
        remove(path)
    name_latest(directory, checkpoint)
    return removed


def explain_failed_save(error: Exception, directory: Path, *, step: int, room: int) -> None:
    """Raise UserError for an error by which a checkpoint could not be written; return for any other."""
    # torch's file writer raises RuntimeError, and says what it was about, not why it failed.
    if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _WRITER_SIGNS):
        return
    raise UserError(
        f"the checkpoint after step {step} could not be written to {directory} ({error}); see to it that this user may "
        f"write there and that {room} checkpoints (checkpoint.keep_last + 1) have room, then start again: the run goes "
        "on from the checkpoint before"
    ) from error
