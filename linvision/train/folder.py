"""The output folder of a run: one run at a time, of one recipe, and nothing in it is ever overwritten by another."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from linvision.data import create_dataset
from linvision.train.checkpoint import check_same_images, check_same_run, checkpoints
from linvision.train.data import fingerprint
from linvision.train.parallel import Processes
from linvision.train.recipe import Recipe


@contextmanager
def run_folder(recipe: Recipe, processes: Processes) -> Iterator[Path]:
    """The output folder, made, locked by the first process and, with `fresh`, emptied; released at the end.

    Raises:
        OSError: It cannot be written, or another process is running in it.
    """
    folder = Path(recipe.run.output_dir)
    locks: list[TextIO] = []
    try:
        processes.first(lambda: prepare(folder, recipe.run.fresh, locks))
        yield folder
    finally:
        for lock in locks:
            lock.close()


def prepare(folder: Path, fresh: bool, locks: list[TextIO]) -> None:
    """Make and lock a folder; the open lock is added to `locks`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locks.append((folder / '.lock').open('w'))
    except OSError as error:
        raise OSError(
            f'The output folder {folder} cannot be written ({error}). Choose another --output-dir.'
        ) from error
    try:
        fcntl.lockf(locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked workers would hold it on
    except (BlockingIOError, PermissionError):
        raise OSError(
            f'Another process is running in {folder}. Wait for it, stop it, or choose another --output-dir.'
        ) from None
    # a worker that torchrun starts again goes on instead of starting over
    if fresh and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        set_aside(folder)


def set_aside(folder: Path) -> None:
    """Move what a folder holds into a folder of its own within it: `earlier_1`, `earlier_2`, …"""
    found = [p for p in folder.iterdir() if p.name != '.lock' and not p.name.startswith('earlier_')]
    if found:
        n = 1 + max((int(p.name.removeprefix('earlier_')) for p in folder.glob('earlier_*')), default=0)
        place = folder / f'earlier_{n}'
        place.mkdir()
        for path in found:
            path.rename(place / path.name)
        print(f'what {folder} held is in {place} now', flush=True)


def finished_run(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The metrics of a finished run of this recipe, or an empty dict, also where its test is still to come.

    Raises:
        ValueError: The folder holds a finished run of another recipe, or on other images.
    """
    metrics = folder / 'metrics.json'
    if not metrics.exists():
        return {}
    found = json.loads(metrics.read_text())
    check_same_run(folder, recipe.to_dict(), found['recipe'])
    data = recipe.data
    moved = str(data.data_dir) != found['recipe']['data_dir']
    may_change = data.dataset == 'image_folder' and Path(data.data_dir).is_dir()  # else they are gone, or fixed
    if 'images' in found and (moved or may_change):
        images = create_dataset(data.dataset, data.data_dir, 'train', data.download, **data.dataset_args)
        check_same_images(folder, fingerprint(images), found['images'])
    to_score = recipe.run.test and 'loss' not in found and checkpoints(folder / 'checkpoints')
    return {} if to_score else found
