"""``python -m tests.kernels.mutation [PART OF A NAME OR FILE]``."""

import sys

from tests.kernels.mutation.run import main

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
