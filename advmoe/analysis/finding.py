# SPDX-License-Identifier: Apache-2.0
"""What an analysis gives: rows for a CSV file and a picture of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """
    Args:
        name: of its files, such as ``dissection``.
        title: a line for people.
        columns, rows: the CSV's; every figure that the picture shows is among them.
        draw: makes the picture of the rows; called when a picture is wanted, since it takes longer than the rows.
        note: what has to be known to read it: images, attack, what a word means.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    draw: Callable[[], Figure]
    note: str = ""

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return text.getvalue()

    def png(self, dpi: int = 150) -> bytes:
        data = io.BytesIO()
        self.draw().savefig(data, format="png", dpi=dpi, metadata={"Software": None})
        return data.getvalue()

    def save(self, folder: Path) -> list[Path]:
        """Writes ``<name>.csv`` and ``<name>.png`` into the folder, which is made, and returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        table, picture = folder / f"{self.name}.csv", folder / f"{self.name}.png"
        table.write_text(self.csv())
        picture.write_bytes(self.png())
        return [table, picture]


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
