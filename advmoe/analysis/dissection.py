# SPDX-License-Identifier: Apache-2.0
"""Does an attack fool the routers, the experts behind them, or both? (AdvMoE, figures 4 and 5)"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from . import style
from .finding import Finding
from .observation import Observation

__all__ = ["dissection"]

CASES = (  # the paper's order: name, routers fooled, prediction fooled
    ("neither", False, False),
    ("routers only", True, False),
    ("prediction only", False, True),
    ("both", True, True),
)


def dissection(observed: Observation) -> Finding:
    """Each image under attack: are the routers fooled, is the prediction fooled? (AdvMoE, figures 4 and 5)

    *Routers fooled*: the choice of any router, of any token, is another than on the clean image. *Prediction fooled*: the
    prediction on the attacked image is wrong; so an image that is wrong without an attack too counts as fooled, and
    ``wrong_clean`` says how many of a row's are such. The four rows' images sum to all images.

    Columns: ``case``, ``routers_fooled`` and ``prediction_fooled`` (0 or 1), ``images``, ``share`` of all images,
    ``wrong_clean`` (images).

    Raises:
        ValueError: for a model without routed layers.
    """
    total = len(observed)
    routers = observed.flipped()
    fooled = observed.attacked != observed.labels
    wrong = observed.clean != observed.labels
    rows = []
    for name, of_routers, of_prediction in CASES:
        here = (routers == of_routers) & (fooled == of_prediction)
        images = int(here.sum())
        rows.append((name, int(of_routers), int(of_prediction), images, images / total, int((here & wrong).sum())))

    def draw() -> Figure:
        with style.figure(7.0, 3.1) as (fig, axis):
            longest = max(row[4] for row in rows)
            edge: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.6}
            right: dict[str, Any] = {"facecolor": style.COLOURS[0], "label": "right when clean", **edge}
            never: dict[str, Any] = {"facecolor": "white", "hatch": "////", "label": "wrong when clean too", **edge}
            for at, (_, _, _, images, share, wrong_clean) in enumerate(rows):
                before = 100 * wrong_clean / total
                axis.barh(at, before, **never)
                axis.barh(at, 100 * share - before, left=before, **right)
                text = f"{100 * share:.1f} % ({images})"
                axis.annotate(text, (100 * share, at), xytext=(5, 0), textcoords="offset points", va="center")
            axis.set_yticks(range(len(rows)), [row[0] for row in rows])
            axis.invert_yaxis()
            axis.set_xlim(0, max(100 * longest * 1.25, 1))
            axis.grid(axis="y", visible=False)
            axis.set_xlabel("share of the images, %")
            axis.set_ylabel("fooled by the attack")
            axis.set_title("What the attack fools", loc="left")
            fig.legend(handles=[Patch(**right), Patch(**never)], loc="outside lower center", ncols=2)
            return fig

    note = (
        f"{observed.note()}. Routers fooled: any router's choice differs from the clean image's. Prediction fooled: "
        "wrong on the attacked image, also where it is wrong without an attack (hatched). The paper's figures 4 and 5"
    )
    return Finding(
        "dissection",
        "What the attack fools: routers, prediction, or both",
        ("case", "routers_fooled", "prediction_fooled", "images", "share", "wrong_clean"),
        rows,
        draw,
        note,
    )
