"""How far a run is."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside the weights.

    Attributes:
        step: Steps taken; with the seed, also the place in the data: step = epoch × batches of an epoch + batch.
        minutes: Minutes of training so far.
        stage: Stage of the last step.
        tokens: Tokens seen.
        best_score: Best score on the validation slice.
        best_step: Where it was.
        curve: Scores on the validation slice on the way, each with its step and minutes.
        bad_images: What could not be read in training, in words.
    """

    step: int = 0
    minutes: float = 0.0
    stage: int = 0
    tokens: int = 0
    best_score: float = 0.0
    best_step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    bad_images: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, state: dict[str, Any], path: Path | None) -> Self:
        """That of a checkpoint's state.

        Raises:
            ValueError: The checkpoint is of another version.
        """
        kept = state.get('progress')
        if isinstance(kept, dict) and set(kept) == {each.name for each in fields(cls)}:
            return cls(**kept)
        raise ValueError(
            f'{path} is of another version of linvision, which kept other facts of a run. Finish the run with that '
            'version, or start over beside it with --fresh.'
        )


def stage_at(stages: tuple[tuple[int, float], ...], fraction: float) -> int:
    """The stage that a fraction of the run belongs to; one on the boundary belongs to the later stage."""
    ends = np.cumsum([length for _, length in stages])
    return min(int(np.searchsorted(ends, fraction + 1e-9, side='right')), len(stages) - 1)
