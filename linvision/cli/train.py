"""Train by a recipe: one of those that come with linvision, by its name, or a file of your own that defines RECIPE.

    linvision train --list
    linvision train fashion_mnist_pixels --epochs 2 --output-dir outputs/short
    linvision train my_recipe.py --help
    torchrun --nproc-per-node 8 -m linvision train cifar10_pixels

`linvision train NAME --help` shows the recipe's page and its flags: every field is one. A file of your own may begin
from a recipe by its name, `from cifar10_pixels import RECIPE`, and change it with `RECIPE.replace(…)`.
"""

import ast
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from linvision.nearest import nearest


def recipe_folder() -> Path:
    """Folder of the recipes: `linvision.recipes` of an installed package, or `recipes/` of a checkout.

    Raises:
        FileNotFoundError: There is neither.
    """
    root = Path(__file__).resolve().parents[2]
    checkout = root / 'recipes'
    if (root / 'pyproject.toml').is_file() and checkout.is_dir():  # first: another copy may be installed beside it
        return checkout
    found = importlib.util.find_spec('linvision.recipes')
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f'linvision has no recipes here: neither {checkout} nor the package linvision.recipes.')
    return Path(found.submodule_search_locations[0])


def catalogue() -> dict[str, Path]:
    """The recipes that come with linvision, by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob('*.py')) if path.stem != '__init__'}


def first_line(file: Path) -> str:
    """What a recipe says of itself first, without running it."""
    return (ast.get_docstring(ast.parse(file.read_text())) or '').partition('\n')[0]


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: Of a recipe that comes with linvision, or the path of a file.

    Raises:
        ValueError: There is no such recipe; the nearest names are listed.
        FileNotFoundError: There is no such file.
    """
    known = catalogue()
    if name in known:
        return known[name]
    if not name.endswith('.py'):
        raise ValueError(f'{nearest("recipe", name, known)} linvision train --list shows all; FILE.py is one of yours.')
    if not Path(name).is_file():
        raise FileNotFoundError(f'{name} does not exist: a file was expected that defines RECIPE.')
    return Path(name).resolve()


def main(words: Sequence[str]) -> None:
    """Train, or show the recipes.

    Args:
        words: A recipe's name or file and its flags, or `--list`.

    Raises:
        ValueError: There is no such recipe, or the file defines none.
    """
    if not words or words[0] in ('-h', '--help', '--list'):
        lines = [f'  {name:22} {first_line(file)}' for name, file in catalogue().items()]
        if words != ['--list']:
            lines = ['usage: linvision train RECIPE …', '', __doc__, *lines]
        print('\n'.join(lines))
        return
    name, *flags = words
    if name.startswith('-'):
        raise ValueError(f'The recipe comes first, then its flags: linvision train RECIPE {name} …')
    file = find_recipe(name)
    import tyro  # noqa: F401  (before torch, which takes seconds: it may be missing)

    import linvision.models.registry  # noqa: F401  (see program.py)

    # recipes import each other by bare names, in worker processes too, which inherit the path
    sys.path[:0] = [str(folder) for folder in (file.parent, recipe_folder()) if str(folder) not in sys.path]
    sys.argv = [f'linvision train {Path(name).name}', *flags]  # the program's name in --help
    ours = file.parent == recipe_folder()
    found = vars(importlib.import_module(file.stem)) if ours else runpy.run_path(str(file))
    if ours and 'RECIPE' not in found:  # segment_pixels has a loop of its own
        found['command']()
        return
    if 'RECIPE' not in found:
        raise ValueError(f'{file} defines no RECIPE; expected RECIPE = Recipe(…) or OTHER.replace(…) in it.')
    from linvision.train import main as train_by_command_line

    train_by_command_line(found['RECIPE'], found.get('__doc__'))
