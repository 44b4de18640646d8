"""Errors for unknown names that say which known names come nearest."""

import difflib
from collections.abc import Iterable


def nearest(what: str, name: str, known: Iterable[str], n: int = 5) -> str:
    """A sentence for an error: what was asked for, and the nearest names that exist.

    Args:
        what: What the name stands for, such as 'projection'.
        name: The unknown name.
        known: All names that exist.
        n: How many names to list; twice as many where nothing is near or there are no more.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=n, cutoff=0.4)
    if len(known) <= 2 * n or not near:
        near += [k for k in known if k not in near][: 2 * n - len(near)]
    return f'Unknown {what} {name!r}. Nearest: {", ".join(near)}.'
