"""Errors for unknown names that say which known names come nearest."""

import difflib
from collections.abc import Iterable


def nearest(what: str, name: str, known: Iterable[str], n: int = 5) -> str:
    """A sentence for an error: what was asked for, and the nearest names that exist.

    Args:
        what: What the name stands for, such as 'projection'.
        name: The unknown name.
        known: All names that exist.
        n: How many names to list at most.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=n, cutoff=0.4) or known[: 2 * n]
    return f'Unknown {what} {name!r}. Nearest: {", ".join(near)}.'
