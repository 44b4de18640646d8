"""The command line of a recipe: every field of `Recipe` is a flag."""

import dataclasses
import logging
import os
import sys

import tyro

from linvision.train.loop import train
from linvision.train.recipe import Recipe


def main(recipe: Recipe, description: str | None = None) -> None:
    """Change the recipe by the command line's flags, then train it.

    Args:
        recipe: The recipe; its values are the defaults of the flags.
        description: Text above the flags in `--help`.
    """
    recipe = tyro.cli(Recipe, default=dataclasses.replace(recipe), description=description)
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    try:
        train(recipe)
    except (ValueError, TypeError, FileNotFoundError, OSError, FloatingPointError) as error:
        if os.environ.get('LINVISION_TRACEBACK'):
            raise
        sys.exit(f'error: {error}')
