"""The output folder of a run: one run at a time, of one recipe, and nothing in it is ever overwritten by another."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from linvision.data import create_dataset
from linvision.data.recorded import read_metrics
from linvision.train.checkpoint import check_same_images, check_same_run, checkpoints, damage, read_state
from linvision.train.data import fingerprint
from linvision.train.parallel import Processes
from linvision.train.pretrained import check_folder, is_source, model_folder
from linvision.train.recipe import Recipe

WRITTEN: dict[str, tuple[str, ...]] = {  # by runs and reports; of a folder, what shows that it is theirs
    'checkpoints': ('step_*', 'damaged_step_*'),
    'model': ('config.json', 'model.safetensors'),
    'tensorboard': ('events.out.tfevents.*',),
    'metrics.json': (),
    'metrics.json.part': (),
    'report.json': (),
    'predictions.png': (),
}
EARLIER = re.compile(r'earlier_\d+')


@contextmanager
def run_folder(recipe: Recipe, processes: Processes) -> Iterator[Path]:
    """The output folder, made, locked by the first process and, with `fresh`, emptied; released at the end.

    Raises:
        OSError: It cannot be written, or another process is running in it.
    """
    folder = Path(recipe.run.output_dir)
    locks: list[TextIO] = []
    new, held = not folder.exists(), False
    try:
        processes.first(lambda: prepare(folder, recipe.run.fresh, locks))
        held = bool(locks)
        yield folder
    finally:
        if held:
            leave_nothing_empty(folder, new)
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
    for path in (folder / 'checkpoints', folder / 'model'):  # found out now, and not when there is something to lose
        if path.exists() and not (path.is_dir() and os.access(path, os.W_OK)):
            raise OSError(
                f'A run writes into the folder {path}, and that is a file, or not yours to write to. Move it away, let '
                'it be written, or choose another --output-dir.'
            )


def leave_nothing_empty(folder: Path, new: bool) -> None:
    """Remove the lock, and a new folder with it, where a run has left nothing else, as one whose data is missing."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == ['.lock']:
            (folder / '.lock').unlink()
            if new:
                folder.rmdir()


def set_aside(folder: Path) -> None:
    """Move what runs and reports have written there into a folder of its own within it: `earlier_1`, `earlier_2`, …"""
    found = [folder / name for name, signs in WRITTEN.items() if is_ours(folder / name, signs)]
    if found:
        numbers = [int(p.name.removeprefix('earlier_')) for p in folder.iterdir() if EARLIER.fullmatch(p.name)]
        place = folder / f'earlier_{max(numbers, default=0) + 1}'
        place.mkdir()
        for path in found:
            path.rename(place / path.name)
        print(f'what a run had written to {folder} is in {place} now', flush=True)


def is_ours(path: Path, signs: tuple[str, ...]) -> bool:
    """Whether a run wrote it: a file of that name, or a folder of that name with what a run leaves in it."""
    return any(any(path.glob(sign)) for sign in signs) if signs else path.is_file()


def as_begun(recipe: Recipe) -> Recipe:
    """A recipe whose weights to start from are gone, with what they decided in the run of its output folder.

    A recipe whose weights are there, or whose folder holds no run from them, is given back as it is.
    """
    if not recipe.init or recipe.run.fresh or recipe.run.dry_run or holds_model(recipe.init):
        return recipe
    folder = Path(recipe.run.output_dir)
    with suppress(ValueError, OSError):
        whole = (path for path in reversed(checkpoints(folder / 'checkpoints')) if not damage(path))
        path = next(whole, None)
        found = read_state(path, look=True)['recipe'] if path else read_metrics(folder / 'metrics.json')['recipe']
        return with_decisions(recipe, found) if found['init'] == recipe.init else recipe
    return recipe


def holds_model(name: str) -> bool:
    """Whether weights may be had by a name: a folder must hold them."""
    if not Path(name).is_dir():
        return is_source(name)
    try:
        return bool(model_folder(Path(name)))
    except FileNotFoundError:
        return False


def with_decisions(recipe: Recipe, found: dict[str, Any]) -> Recipe:
    """A recipe with what its weights decided in a run: its model, if it names none, or the span of convolutions."""
    data, kept = recipe.data, found['model_args']
    if recipe.model:  # what else the run had, the command must say again
        own = ('local_grid', *(['dynamic_img_size'] if data.native_sizes else []))
        kept = {name: kept[name] for name in own if name in kept}
    return recipe.replace(
        model=recipe.model or found['model'],
        model_args=kept | recipe.model_args,
        img_size=data.img_size if data.img_size or data.stages else found['img_size'],
        compile=found['compile'] if data.native_sizes else recipe.run.compile,
    )


def finished_run(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The metrics of a finished run of this recipe, or an empty dict: also where its test is still to come, and where
    metrics or model are damaged and there is a checkpoint to make them from again.

    Raises:
        ValueError: The folder holds a finished run of other settings, or on other images; or its metrics are damaged,
            and there is no checkpoint.
    """
    metrics, again = folder / 'metrics.json', bool(checkpoints(folder / 'checkpoints'))
    if not metrics.exists():
        return {}
    try:
        found = read_metrics(metrics)
    except ValueError as error:
        if not again or metrics.is_dir():
            raise ValueError(
                f'{error} Put it back as it was, or start over beside it with --fresh or in another --output-dir.'
            ) from error
        print(f'{error} The run is scored again from its last checkpoint.', flush=True)
        return {}
    check_same_run(folder, recipe.to_dict(), found['recipe'])
    data = recipe.data
    moved = str(data.data_dir) != found['recipe'].get('data_dir')
    may_change = data.dataset == 'image_folder' and Path(data.data_dir).is_dir()  # else they are gone, or fixed
    if 'images' in found and (moved or may_change):
        images = create_dataset(data.dataset, data.data_dir, 'train', data.download, **data.dataset_args)
        check_same_images(folder, fingerprint(images), found['images'])
    if again and recipe.run.test and 'loss' not in found:
        return {}
    try:
        check_folder(folder / 'model')
    except (OSError, ValueError) as error:
        what = (
            'The run is scored and its model written again from its last checkpoint.'
            if again
            else ('There is no checkpoint to write it from again: the score alone is left.')
        )
        print(f'{error} {what}', flush=True)
        return {} if again else found
    return found
