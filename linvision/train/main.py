"""The command line of a recipe: every field of `Recipe` and of its groups is a flag."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from types import FrameType

from linvision.data.loader_batches import SIGNALS
from linvision.extras import needed
from linvision.guard import guarded
from linvision.train.loop import train
from linvision.train.recipe import Recipe


class Interrupt:
    """Signals that ask a run to end, noted: it ends after its step, with a checkpoint, or after its scores.

    They are Ctrl-C, SIGTERM, SIGHUP of a terminal that is closed (unless `nohup` has the run go on), and SIGUSR1 and
    SIGUSR2, which clusters send before they take a machine away. A second Ctrl-C ends the run at once.
    """

    def __init__(self) -> None:
        self.number, self.process = 0, os.getpid()
        for number in (signal.SIGINT, *SIGNALS):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if os.getpid() != self.process:  # a worker at its very start, which leaves signals to the run's own process
            return
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            with suppress(OSError):  # the terminal may be gone; and print is not reentrant
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
    refuse_empty_paths(sys.argv[1:] if args is None else args)
    with needed('linvision train'):
        import tyro
    added = {name: recipe.fields()[name] for name in ('model_args', 'opt_args', 'dataset_args')}
    bare = recipe.replace(**{name: {} for name in added})  # tyro offers only the keys of a default
    words = sys.argv[1:] if args is None else args
    found = tyro.cli(Recipe, default=bare, description=description, args=args, config=(tyro.conf.OmitArgPrefixes,))
    found = found.replace(**{name: {**added[name], **found.fields()[name]} for name in added})
    return one_length(found, {word.partition('=')[0].replace('_', '-') for word in words})


def one_length(recipe: Recipe, flags: set[str]) -> Recipe:
    """The recipe without its minutes where epochs are asked for, which they would replace.

    Raises:
        ValueError: Both are asked for.
    """
    run = recipe.run
    if '--epochs' not in flags or not run.max_minutes:
        return recipe
    if '--max-minutes' in flags:
        raise ValueError(
            f'--epochs {run.epochs:g} and --max-minutes {run.max_minutes:g} both say how long the run is: give one of '
            'them.'
        )
    return recipe.replace(max_minutes=0.0)


def refuse_empty_paths(words: Sequence[str]) -> None:
    """Raise ValueError for a folder named '', as of a shell's variable that is not set: Python reads it as '.'."""
    for word, after in zip_longest(words, words[1:]):
        name, equals, value = word.partition('=')
        if name.replace('_', '-') in ('--output-dir', '--data-dir') and (value if equals else after) == '':
            raise ValueError(f"{name} is empty: name a folder. The one that you are in is '.'.")


def main(recipe: Recipe, description: str | None = None) -> None:
    """Change the recipe by the command line's flags, then train it.

    Args:
        recipe: The recipe; its values are the defaults of the flags.
        description: Text above the flags in `--help`.
    """
    with guarded():
        recipe = read_flags(recipe, description)
        interrupt = Interrupt()
        try:
            finished = train(recipe, interrupt)
        except KeyboardInterrupt:
            finished = {}
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one would meet workers that are being ended
            print('stopped at once; the same command goes on from the last checkpoint', file=sys.stderr)
        if interrupt() and not finished:
            sys.exit(128 + interrupt.number)
