"""The command line of a recipe: every field of `Recipe` and of its groups is a flag."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from linvision.extras import needed
from linvision.guard import guarded
from linvision.train.loop import train
from linvision.train.recipe import Recipe


class Interrupt:
    """Ctrl-C and SIGTERM, noted: the run ends after its step, with a checkpoint, or after its scores.

    A second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            # print is not reentrant
            os.write(2, b'noted: the run stops after its step, or its scores; Ctrl-C once more stops at once\n')
        self.number = number

    def __call__(self) -> bool:
        """Whether the run is to end."""
        return self.number != 0


def read_flags(recipe: Recipe, description: str | None = None, args: Sequence[str] | None = None) -> Recipe:
    """The recipe, changed by the command line's flags, which have no prefixes.

    `--model-args`, `--opt-args` and `--dataset-args` add to the recipe's own.

    Args:
        recipe: The recipe; its values are the defaults of the flags.
        description: Text above the flags in `--help`.
        args: The flags; those of the command line by default.
    """
    with needed('linvision train'):
        import tyro
    added = {name: recipe.fields()[name] for name in ('model_args', 'opt_args', 'dataset_args')}
    bare = recipe.replace(**{name: {} for name in added})  # tyro offers only the keys of a default
    found = tyro.cli(Recipe, default=bare, description=description, args=args, config=(tyro.conf.OmitArgPrefixes,))
    return found.replace(**{name: {**added[name], **found.fields()[name]} for name in added})


def main(recipe: Recipe, description: str | None = None) -> None:
    """Change the recipe by the command line's flags, then train it.

    Args:
        recipe: The recipe; its values are the defaults of the flags.
        description: Text above the flags in `--help`.
    """
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    with guarded():
        recipe = read_flags(recipe, description)
        interrupt = Interrupt()
        try:
            finished = train(recipe, interrupt)
        except KeyboardInterrupt:
            finished = {}
            print('stopped at once; the same command goes on from the last checkpoint', file=sys.stderr)
        if interrupt() and not finished:
            sys.exit(128 + interrupt.number)
