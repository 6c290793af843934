# SPDX-License-Identifier: Apache-2.0
"""The command, before torch is loaded."""

from __future__ import annotations

import os
import sys

from .memory import keep_freed_memory

SPINS = 10_000  # of 300,000: about as fast alone, twice as fast beside another program (docs/performance.md)


def main() -> int:
    # How long threads that wait for each other spin before they sleep. libgomp reads it when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    keep_freed_memory()
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:  # while all that is loaded; later the command says what to do
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
