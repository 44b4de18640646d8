"""What this repository itself is made and measured with; none of it is in the wheel. Run from the repository's root."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
