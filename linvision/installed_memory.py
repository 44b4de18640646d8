"""How much memory the machine has."""

import math
import os


def installed_gib() -> float:
    """GiB of memory, in use or not; infinite where the system does not say."""
    if not hasattr(os, 'sysconf'):  # Windows
        return math.inf
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30
