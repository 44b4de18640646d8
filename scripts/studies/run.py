"""Run a study: train what it compares, and write its figures, its table and its pictures.

    python -m scripts.studies.run --list
    python -m scripts.studies.run parity --help
    python -m scripts.studies.run parity

Figures go to `scripts/studies/results/`, tables and pictures into the pages of `docs/`. A study that was stopped goes
on: runs that are finished in its folder, or whose figures are kept in `results/`, are not repeated.
"""

import importlib
import sys
from collections.abc import Sequence

import tyro

from linvision.guard import guarded
from linvision.nearest import nearest
from scripts.studies import changes

# those with steps of their own: a function of the study's name in a module, which also says what it can be asked
MODULES = {
    'parity': 'attention',
    'sharing': 'attention',
    'photographs': 'photographs',
    'other_rows': 'other_rows',
    'pretraining': 'pretraining',
    'transfer': 'transfer',
    'few_labels': 'few_labels',
    'clipart': 'clipart',
    'conversion': 'conversion',
    'rotary': 'rotary',
    'segmentation': 'segmentation',
    'pathfinder': 'pathfinder',
    'attended': 'attended',
}


def question(name: str) -> str:
    """What a study is to answer, in a line."""
    if name in changes.STUDIES:
        return changes.STUDIES[name].question
    module = importlib.import_module(f'scripts.studies.{MODULES[name]}')
    return getattr(module, name).__doc__.partition('\n')[0]


def main(words: Sequence[str] | None = None) -> None:
    """Run a study.

    Args:
        words: Its name and flags, or `--list`; those of the program by default.

    Raises:
        ValueError: There is no such study; the nearest are listed.
    """
    words = list(sys.argv[1:] if words is None else words)
    names = [*changes.STUDIES, *MODULES]
    if not words or words[0] in ('-h', '--help', '--list'):
        lines = [f'  {name:13} {question(name)}' for name in names]
        print('\n'.join(lines if words == ['--list'] else [__doc__, *lines]))
        return
    name, *flags = words
    if name not in names:
        raise ValueError(f'{nearest("study", name, names)} --list shows what each is to answer.')
    program = f'python -m scripts.studies.run {name}'
    if name in changes.STUDIES:
        of = changes.STUDIES[name]
        text = f'{of.question}\n\n{changes.__doc__}'
        changes.run(name, tyro.cli(changes.Settings, prog=program, description=text, default=of.flags, args=flags))
        return
    module = importlib.import_module(f'scripts.studies.{MODULES[name]}')
    getattr(module, name)(tyro.cli(module.Settings, prog=program, description=module.__doc__, args=flags))


if __name__ == '__main__':
    with guarded():
        main()
