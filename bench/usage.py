"""Wrong usage is one line that says what is known here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """The user asked for something that cannot be done; the message is one line for them."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`unknown workload 'nt_xnt'; did you mean nt_xent? Workloads: nt_xent, …`"""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    plural = what if what == "data" else f"{what}s"
    return f"unknown {what} {name!r}{hint} {plural.capitalize()}: {', '.join(known)}"
