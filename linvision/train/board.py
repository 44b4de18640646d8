"""What a run shows: lines or a progress bar on the terminal, and TensorBoard. Only the first process shows anything."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from linvision.analysis.figure_text import literal
from linvision.data import Batches
from linvision.train.checkpoint import first_line
from linvision.train.evaluate import score_words
from linvision.train.events import Events
from linvision.train.recipe import Recipe

HISTOGRAMS = 10  # of the weights, in a run

_logger = logging.getLogger(__name__)


class Board:
    """Progress on the terminal and in TensorBoard.

    Args:
        folder: Output folder of the run; TensorBoard's files go into `tensorboard/`. None for no TensorBoard.
        recipe: The recipe, shown as text.
        step: First step, for a run that is resumed: later points of the interrupted run are dropped.
        speaks: Whether this process prints.
    """

    def __init__(self, folder: Path | None, recipe: Recipe, step: int, speaks: bool = True) -> None:
        self.shows, self.speaks, self.bar, self.drawn = folder is not None, speaks, None, -1
        self.events = Events(folder and folder / 'tensorboard', step)
        text = json.dumps(recipe.to_dict(), indent=2)
        self.events.write('add_text', 'recipe', '    ' + text.replace('\n', '\n    '), step)
        if self.shows and sys.stderr.isatty():
            self.bar = tqdm(total=100, unit='%', bar_format='{l_bar}{bar}|{postfix}')

    def log(self, step: int, progress: float, scalars: dict[str, float], minutes: float) -> None:
        """One point: a line (or the bar), and the scalars.

        Args:
            step: Steps taken.
            progress: Share of the run that is done, 0..1.
            scalars: Values by TensorBoard tag.
            minutes: Minutes of training so far.
        """
        if not self.shows:
            return
        for name, value in scalars.items():
            self.events.write('add_scalar', name, value, step)
        waiting, speed = scalars['speed/waiting_for_data'], scalars['speed/images_per_s']
        left = minutes / progress - minutes if progress > 0 else float('nan')
        words = (
            f'loss {scalars["train/loss"]:.3f}  {speed:.{0 if speed >= 9.95 else 1}f} images/s  '
            f'lr {scalars["train/lr"]:.2g}  {left:.1f} min left'
            + (f'  (waits for images {100 * waiting:.0f} % of the time: try more --workers)' if waiting > 0.5 else '')
        )
        if self.bar is None:
            self.say(f'step {step}  {100 * progress:.0f} %  {words}')
            return
        self.bar.n = round(100 * progress, 1)
        with self.audience():
            self.bar.set_postfix_str(words)

    def scores(self, split: str, step: int, scores: dict[str, Any]) -> None:
        """Scores of one split: a line, and scalars `<split>/top1` and so on."""
        if not self.shows:
            return
        for name in ('loss', 'top1', 'top5'):
            if name in scores:
                self.events.write('add_scalar', f'{split}/{name}', scores[name], step)
        self.say(f'{split}: {score_words(scores)} (step {step})')
        self.events.write('flush')

    def batch(self, images: Tensor, step: int) -> None:
        """The first images of an augmented batch as a picture, each stretched to 0..1."""
        if not self.shows or not isinstance(images, Tensor):  # of one size
            return
        from torchvision.utils import make_grid

        images = images[:32].float().cpu()
        if images.shape[1] not in (1, 3):
            images = images[:, :1]
        grid = make_grid(images, nrow=8, normalize=True, scale_each=True)
        self.events.write('add_image', 'train/batch', grid, step)

    def weights(self, model: nn.Module, step: int, progress: float) -> None:
        """Histograms of the weights, ten times in a run; of sharded ones, those of this process."""
        if not self.shows or int(progress * HISTOGRAMS) == self.drawn:
            return
        self.drawn = int(progress * HISTOGRAMS)
        for name, parameter in model.named_parameters():
            values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if values.numel():
                self.events.write('add_histogram', f'weights/{name}', values.detach().float().cpu(), step)

    def pictures(
        self,
        split: str,
        drawings: dict[str, Callable[..., Any]],
        model: nn.Module,
        batches: Batches,
        img_size: int,
        classes: tuple[str, ...],
        step: int,
    ) -> None:
        """Pictures of a trained model on a set, by name (see `pictures.py`); one that fails is left out, in words."""
        writer = self.events.writer
        if writer is None:
            return
        for name, draw in drawings.items():
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings('ignore', 'Glyph')  # a script without a font is drawn as boxes
                    figure = draw(model, batches, img_size, classes)
                    if figure is not None:
                        writer.add_figure(f'{split}/{name}', figure, step)
            except Exception as error:  # whatever it is, the run has its score and its model
                words = f'{type(error).__name__}: {first_line(error)}'
                _logger.warning(f'no picture {split}/{name} ({words}); score and model are written all the same')
        self.events.write('flush')

    def hparams(self, recipe: Recipe, metrics: dict[str, Any], step: int) -> None:
        """The recipe's settings beside the final scores."""
        plain = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in recipe.to_dict().items()}
        settings = {k: literal(v) if isinstance(v, str) else v for k, v in plain.items()}
        found = {f'final/{k}': metrics[k] for k in ('top1', 'loss', 'val_top1', 'val_loss') if k in metrics}
        self.events.write('add_hparams', settings, found, run_name='.', global_step=step)

    def flush(self) -> None:
        """Bring the points so far to the disk."""
        self.events.write('flush')

    def say(self, words: str) -> None:
        """A line that leaves the progress bar whole."""
        with self.audience():
            if self.bar is not None:
                self.bar.write(words)
            elif self.speaks:
                print(words, flush=True)

    @contextmanager
    def audience(self) -> Iterator[None]:
        """Say no more, and go on, where the terminal is closed or the reader of a pipe has gone."""
        try:
            yield
        except OSError:
            self.speaks, self.bar = False, None
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:  # what it still holds goes nowhere, or Python would fail with it at the end
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def close(self) -> None:
        """Flush and close."""
        if self.bar is not None:
            with self.audience():
                self.bar.close()
        self.events.close()
