"""Whether losses and gradients are finite, asked of the device as seldom as the run can bear."""

from pathlib import Path

import torch
from torch import Tensor


class FiniteCheck:
    """Notes what is not finite on the device, and raises when it is asked; on an accelerator, asking waits for it.

    Args:
        device: Where losses are.
        step: Steps taken so far.
    """

    def __init__(self, device: torch.device, step: int) -> None:
        self.finite, self.checked = torch.ones((), dtype=torch.bool, device=device), step

    def note(self, *values: Tensor) -> None:
        """Take in values of a step."""
        for value in values:
            self.finite &= torch.isfinite(value)

    def check(self, steps: int, folder: Path | None) -> None:
        """Raise FloatingPointError where a value since the last check, up to `steps` steps, was not finite."""
        if not self.finite:
            last = steps - 1
            where = f'step {last}' if self.checked == last else f'steps {self.checked} to {last}'
            raise FloatingPointError(
                f'The loss or its gradient is not finite in {where}. The checkpoints in {folder}/checkpoints are as '
                'they were, and go on only with the settings that they were made with: try a smaller --lr or '
                '--precision fp32 with --fresh, or in another --output-dir.'
            )
        self.checked = steps
