"""What a run shows: lines or a progress bar on the terminal, and TensorBoard."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from linvision.train.recipe import Recipe


class Board:
    """Progress on the terminal and in TensorBoard.

    Args:
        folder: Output folder of the run; TensorBoard's files go into `tensorboard/`.
        recipe: The recipe, shown as text.
        step: First step, for a run that is resumed: later points of the interrupted run are dropped.
    """

    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=step if step else None)
        text = json.dumps(recipe.to_dict(), indent=2)
        self.writer.add_text('recipe', '    ' + text.replace('\n', '\n    '), step)
        self.bar = tqdm(total=100, unit='%', bar_format='{l_bar}{bar}|{postfix}') if sys.stderr.isatty() else None

    def log(self, step: int, progress: float, scalars: dict[str, float], minutes: float) -> None:
        """One point: a line (or the bar), and the scalars.

        Args:
            step: Steps taken.
            progress: Share of the run that is done, 0..1.
            scalars: Values by TensorBoard tag.
            minutes: Minutes of training so far.
        """
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        left = minutes / progress - minutes if progress > 0 else float('nan')
        words = (
            f'loss {scalars["train/loss"]:.3f}  {scalars["speed/images_per_s"]:.0f} images/s  '
            f'lr {scalars["train/lr"]:.2g}  {left:.1f} min left'
        )
        if self.bar is not None:
            self.bar.n = round(100 * progress, 1)
            self.bar.set_postfix_str(words)
        else:
            print(f'step {step}  {100 * progress:.0f} %  {words}', flush=True)

    def scores(self, split: str, step: int, scores: dict[str, Any]) -> None:
        """Scores of one split: a line, and scalars `<split>/top1` and so on."""
        for name in ('loss', 'top1', 'top5'):
            self.writer.add_scalar(f'{split}/{name}', scores[name], step)
        self.say(
            f'{split}: top-1 {100 * scores["top1"]:.2f} %, top-5 {100 * scores["top5"]:.2f} %, '
            f'loss {scores["loss"]:.4f}, {scores["num_samples"]:,} images (step {step})'
        )
        self.writer.flush()

    def batch(self, images: Tensor, step: int) -> None:
        """The first images of an augmented batch as a picture, each stretched to 0..1."""
        from torchvision.utils import make_grid

        images = images[:32].float().cpu()
        if images.shape[1] not in (1, 3):
            images = images[:, :1]
        self.writer.add_image('train/batch', make_grid(images, nrow=8, normalize=True, scale_each=True), step)

    def say(self, words: str) -> None:
        """A line that leaves the progress bar whole."""
        if self.bar is not None:
            self.bar.write(words)
        else:
            print(words, flush=True)

    def close(self) -> None:
        """Flush and close."""
        if self.bar is not None:
            self.bar.close()
        self.writer.close()


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: on the accelerator, or the process's resident set on the CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == 'darwin' else 2**20)
