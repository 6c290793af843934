# SPDX-License-Identifier: Apache-2.0
"""The command, before torch is loaded."""

from __future__ import annotations

import os
import sys


def main() -> int:
    # Threads that wait for each other sleep instead of spinning, which costs many times as much where another program
    # wants the cores too (docs/performance.md). OpenMP reads it when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:  # while all that is loaded; later the command says what to do
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
