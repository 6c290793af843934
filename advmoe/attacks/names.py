# SPDX-License-Identifier: Apache-2.0
"""Attacks by their names, as commands and records have them."""

from __future__ import annotations

import difflib
import re

from .autoattack import ATTACKS, VERSIONS, AutoAttack
from .pgd import LOSSES, PGD

__all__ = ["NAMES", "Attack", "from_name"]

Attack = PGD | AutoAttack

_FAMILIES = {  # what PGD's options are
    "pgd": {},
    "trades": {"loss": "kl", "random_start": "gaussian"},
    "experts": {"against": "experts"},
    "router": {"against": "router"},
    "flip": {"against": "flip"},
    "joint": {"against": "joint"},
    "soft": {"against": "soft"},
}
NAMES = (
    "fgsm, or pgd<steps>[x<restarts>] with -ce, -kl, -margin, -dlr, -l2, -eot<n> behind it, such as pgd50x5-margin; "
    "trades, experts, router, flip, joint and soft likewise; autoattack, autoattack-rand, autoattack-plus, "
    f"{', '.join(ATTACKS)}, with -l2 behind it; apgd<steps>-ce, -dlr and -t"
)
_ITERATED = re.compile(
    rf"(?P<family>{'|'.join(_FAMILIES)})(?P<steps>[1-9]\d*)(?:x(?P<restarts>[1-9]\d*))?(?P<rest>(?:-\w+)*)"
)
_APGD = re.compile(r"apgd(?P<steps>[1-9]\d*)(?P<rest>-\w+)")
_WHOLE = re.compile(rf"autoattack(?:-({'|'.join(VERSIONS[1:])}))?")


def from_name(name: str, epsilon: float, step_size: float | None = None, retire: bool = True) -> Attack:
    """An attack by its name (:data:`NAMES`), such as ``pgd50x2``, ``pgd20-margin`` or ``autoattack``.

    - ``pgd``: on the prediction; ``trades``: TRADES' own, KL from a Gaussian start;
    - ``experts`` (RA-E), ``router`` (RA-R), ``flip``, ``joint``, ``soft``: see :data:`advmoe.attacks.AGAINST`;
    - ``fgsm``: one step of epsilon from the clean image;
    - ``autoattack`` and its parts: see :class:`AutoAttack`; ``apgd20-ce`` is the part ``apgd-ce`` with 20 steps.

    Args:
        epsilon: of the pixel range [0, 1]; for ``-l2`` the length of the whole image's change.
        step_size: epsilon / 4 by default (2/255 at 8/255).
        retire: see :class:`PGD`.

    Raises:
        ValueError: if the name does not read so.
    """
    plain = name.removesuffix("-l2")
    norm = "linf" if plain == name else "l2"
    if plain == "fgsm":
        return PGD(epsilon, epsilon if step_size is None else step_size, 1, random_start=False, norm=norm, retire=False)
    whole = _WHOLE.fullmatch(plain)
    if whole is not None:
        return AutoAttack(epsilon, norm, whole[1] or "standard")
    if plain in ATTACKS:
        return AutoAttack(epsilon, norm, attacks=(plain,))
    apgd = _APGD.fullmatch(plain)
    if apgd is not None and "apgd" + apgd["rest"] in ATTACKS:
        return AutoAttack(epsilon, norm, attacks=("apgd" + apgd["rest"],), steps=int(apgd["steps"]))
    match = _ITERATED.fullmatch(name)
    options: dict = {} if match is None else dict(_FAMILIES[match["family"]])
    for word in [] if match is None else match["rest"].split("-")[1:]:
        key, value = _option(word)
        if key is None or key in options:  # unknown, or said twice, or what the family has decided
            match = None
            break
        options[key] = value
    if match is None or (options.get("against") in ("router", "flip") and "loss" in options):
        steps = "".join(c for c in name if c.isdigit()) or "50"
        known = ["fgsm", "autoattack", *ATTACKS, *(family + steps for family in _FAMILIES)]
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"attack: expected {NAMES}; got {name!r}{hint}")
    step = epsilon / 4 if step_size is None else step_size
    return PGD(epsilon, step, int(match["steps"]), int(match["restarts"] or 1), retire=retire, **options)


def _option(word: str) -> tuple[str | None, str | int]:
    if word in LOSSES:
        return "loss", word
    if word == "l2":
        return "norm", word
    draws = re.fullmatch(r"eot([1-9]\d*)", word)
    return (None, word) if draws is None else ("eot", int(draws[1]))
