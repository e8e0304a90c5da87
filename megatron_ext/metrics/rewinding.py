"""metrics.jsonl of a run that was there before: its end is mended, and steps that are trained again are taken out."""

import json
import os
from mmap import ACCESS_READ, mmap
from pathlib import Path

from megatron_ext.metrics.reading import read_records
from megatron_ext.metrics.records import EvalRecord, Record, TrainRecord
from megatron_ext.runtime.files import replacing


def repair_end(path: Path) -> None:
    """End the file with a whole line: a partial last line is cut off, a whole one without its newline gets it."""
    with path.open("rb+") as file:
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            line = content[start:]
        try:
            json.loads(line)
        except ValueError:
            # An empty line too: then nothing is cut off.
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def drop_after(path: Path, step: int) -> bool:
    """Replace the file by one without train and eval records after ``step``; False where there are none.

    The file is replaced in one go: whoever reads it sees the old or the new one.
    """
    if not any(_is_after(record, step) for _, record in read_records(path)):
        return False
    with replacing(path) as out:
        for line, record in read_records(path):
            if not _is_after(record, step):
                out.write(line + b"\n")
    return True


def copy_after(path: Path, step: int, *, to: Path) -> None:
    """Append the train and eval records after ``step`` to the file ``to``."""
    with to.open("ab") as out:
        out.writelines(line + b"\n" for line, record in read_records(path) if _is_after(record, step))
        out.flush()
        os.fsync(out.fileno())


def _is_after(record: Record | None, step: int) -> bool:
    return isinstance(record, TrainRecord | EvalRecord) and record.step > step
