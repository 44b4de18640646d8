"""Checkpoints of a run: written whole or not at all, the last two kept, and never mixed up with another run's."""

import json
import os
from pathlib import Path
from typing import Any

import torch

FREE_TO_CHANGE = {
    'output_dir',
    'data_dir',
    'download',
    'max_steps',
    'log_every',
    'checkpoint_every',
    'device',
    'threads',
}


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` as the checkpoint of a step, then remove all but the last `keep`.

    The file appears under its name only once it is whole and on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'step_{step:08d}.pt'
    part = path.with_suffix('.part')
    with part.open('wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    for old in sorted(folder.glob('step_*.pt'))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None. A damaged one is passed over, with a line that says so."""
    for path in sorted(folder.glob('step_*.pt'), reverse=True):
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            print(f'{path} cannot be read ({str(error).splitlines()[0]}); the one before it is used.')
    return None


def check_same_run(folder: Path, recipe: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError where a folder holds a run of another recipe.

    Args:
        folder: The output folder.
        recipe: The recipe that is to run.
        found: The recipe found in the folder.
    """
    recipe, found = json.loads(json.dumps(recipe)), json.loads(json.dumps(found))  # tuples as JSON keeps them
    changed = [k for k in recipe if k not in FREE_TO_CHANGE and found.get(k) != recipe[k]]
    if changed:
        words = ', '.join(f'{k}: {found.get(k)} there, {recipe[k]} now' for k in changed)
        raise ValueError(
            f'{folder} holds a run of another recipe ({words}). Nothing was changed. Choose another --output-dir, or '
            'run the recipe that the folder was made with.'
        )
