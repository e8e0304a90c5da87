"""What the benchmarks share: their command line and the median of some calls."""

import argparse
import statistics
import time
from collections.abc import Callable


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line: its docstring as the help, and ``--quick``, with which tests run it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once: shows that it runs, measures nothing")
    return parser


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
