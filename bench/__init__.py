# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ``pytest bench --benchmark-only`` for latencies, ``python -m bench.table`` for paired ratios of layers and
(``--level``) of whole networks, ``python -m bench.gate`` for limits that ratios must keep."""
