"""The `linvision` command: finds the subcommand's module, and turns a user's mistake into one line.

    linvision train fashion_mnist_pixels --epochs 2
    linvision predict outputs/demo MY_IMAGES

A module is imported when its command is called, and only then; its text is the command's `--help`. What becomes of an
error, `guard.py` says.
"""

import importlib
import sys
from collections.abc import Sequence

from linvision.extras import needed
from linvision.guard import end, guarded
from linvision.nearest import nearest
from linvision.version import __version__

COMMANDS = {
    'train': 'train by a recipe, on one device or under torchrun',
    'evaluate': 'score a trained model on a data set, at its own image size or another',
    'predict': 'classify images',
    'convert': 'a plain ViT as a Linformer ViT, fitted to images',
    'export': 'a model as a file for torch.export or ONNX',
    'visualize': 'draw what a model attends to, its projection, its positions',
    'spectrum': "how low-rank a model's attention is, and which K keeps what",
    'models': 'the registered models: tokens, K, parameters, multiply-adds',
}


def usage() -> str:
    """What `linvision --help` prints."""
    lines = [f'  {name:10} {what}' for name, what in COMMANDS.items()]
    return '\n'.join(
        ['usage: linvision COMMAND …', '', *lines, '', 'linvision COMMAND --help: its flags; linvision --version']
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        words: The command and its arguments; those of the program by default.
    """
    words = list(sys.argv[1:] if words is None else words)
    with guarded():
        if words in ([], ['-h'], ['--help']):
            print(usage())
            sys.exit(0 if words else 2)
        if words == ['--version']:
            print(__version__)
            return
        name, *rest = words
        if name not in COMMANDS:
            end(f'{nearest("command", name, COMMANDS, n=len(COMMANDS))} linvision --help shows what they do.')
        with needed(f'linvision {name}'):
            run(name, rest)


def run(name: str, words: Sequence[str]) -> None:
    """Import the module of a command and run it.

    Args:
        name: One of `COMMANDS`.
        words: Its arguments.
    """
    if name == 'train':  # its flags are known once the recipe is
        importlib.import_module('linvision.cli.train').main(words)
        return
    import tyro  # before torch, which takes seconds: it may be missing

    importlib.import_module('linvision.models.registry')  # see program.py
    module = importlib.import_module(f'linvision.cli.{name}')
    tyro.cli(module.main, prog=f'linvision {name}', description=module.__doc__, args=words)


if __name__ == '__main__':
    main()
