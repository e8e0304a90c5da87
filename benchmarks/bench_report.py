"""How long the HTML report of five runs of 50,000 steps takes (CPU seconds), and how large it is.

Run it as ``python benchmarks/bench_report.py``.
"""

import sys
import tempfile
import time
from pathlib import Path

from measuring import parser_of
from megatron_ext.analysis.comparison import compare
from megatron_ext.analysis.report import report_page
from megatron_ext.analysis.run_data import read_run

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.analysis.runs import write_metrics


def main() -> None:
    """Measure and print."""
    count, steps = (2, 500) if parser_of(__doc__).parse_args().quick else (5, 50_000)
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_metrics(Path(folder) / f"run{number}", steps=steps, seed=number) for number in range(count)]
        began = time.process_time()
        runs = [read_run(path, label=path.name) for path in paths]
        read = time.process_time()
        comparison = compare(runs)
        page = report_page(runs, comparison, title="bench")
        drawn = time.process_time()
    sys.stdout.write(f"{count} runs of {steps:,} steps\n")
    sys.stdout.write(f"read {read - began:6.2f} s, page {drawn - read:6.2f} s, {len(page.encode()) / 1e6:.2f} MB\n")


if __name__ == "__main__":
    main()
