"""Checkpoints of a run: written whole or not at all, checked when read, and never mixed up with another run's.

    checkpoints/step_00000500/
        state.pt          recipe, step, stage, clock, random states; model, moving average and optimizer
        shards/           model, moving average and optimizer instead, under FSDP: PyTorch's distributed checkpoint,
                          which loads on any number of processes
        checksums.json    SHA-256 of each file

A checkpoint is made in a folder named `.part`, brought to the disk, and then renamed. `state.pt` is read with
`weights_only=True`, and the shards as `sharded.py` does: they can hold no code.
"""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from linvision.data.timm_sets import STREAMS
from linvision.train.parallel import Processes
from linvision.train.precision import DTYPES
from linvision.train.recipe import Recipe
from linvision.train.sharded import ShardPlanner, ShardReader, refusal

FREE_TO_CHANGE = {
    'output_dir',
    'data_dir',
    'download',
    'test',
    'fresh',
    'dry_run',
    'max_steps',
    'log_every',
    'checkpoint_every',
    'keep_checkpoints',
    'accumulate',
    'chunk_size',
    'grad_checkpointing',
    'sequence',
    'eval_batch_size',
    'on_bad_image',
    'device',
    'threads',
}
NAME = re.compile(r'step_\d{8,}')  # of a checkpoint: other files beside them are none of ours
CONTENT = {  # of a state, what a run cannot go on without
    'recipe': {'dataset_args'},
    'random': {'python', 'numpy', 'torch', 'cuda'},
    'learner': {'scaler', 'schedule'},
}


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    shards: dict[str, Any],
    processes: Processes,
    keep: int = 2,
    best_step: int = 0,
) -> None:
    """Write the checkpoint of a step; all processes call this together.

    Args:
        folder: Where checkpoints are.
        step: Steps taken.
        state: What the first process writes.
        shards: What each process holds a part of; empty but for FSDP.
        processes: The processes.
        keep: How many to keep, the newest; the others are removed.
        best_step: The step of one more that stays.

    Raises:
        OSError: It cannot be written; those before it are as they were.
    """
    path = folder / f'step_{step:08d}'
    part = path.with_suffix('.part')
    try:
        if processes.main:
            remove(part)
            part.mkdir(parents=True)
            torch.save(state, part / 'state.pt')
        if shards:
            processes.wait()
            own_error(dcp.save, shards, checkpoint_id=part / 'shards')
            processes.wait()
        if processes.main:
            seal(part)
            remove(path)  # a damaged one of the same step
            os.replace(part, path)
            sync(folder)
            kept = {path, folder / f'step_{best_step:08d}', *checkpoints(folder)[-keep:]}
            for old in set(checkpoints(folder)) - kept:
                shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if processes.main:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f'The checkpoint of step {step} cannot be written to {folder} ({first_line(error)}; '
            f'{shutil.disk_usage(folder.parent).free / 2**30:.2f} GiB are free). The checkpoints before it are as they '
            'were; make room there, and the same command goes on from the last of them.'
        ) from error


def seal(part: Path) -> None:
    """Bring a checkpoint's files to the disk and write their checksums beside them."""
    sums = {}
    for path in sorted(p for p in part.rglob('*') if p.is_file()):
        sums[str(path.relative_to(part))] = digest(path)
    (part / 'checksums.json').write_text(json.dumps(sums, indent=2))
    for path in [*part.rglob('*'), part]:
        sync(path)


def remove(path: Path) -> None:
    """Remove what has a checkpoint's name, if it is there."""
    if path.is_file() or path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob('step_*') if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix('step_')))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None where there is none at all. Damaged ones are renamed, and a line says so.

    Raises:
        ValueError: There are checkpoints, and all of them are damaged.
        OSError: A file is there and cannot be read, or holds code.
    """
    for part in folder.glob('step_*.part'):
        if NAME.fullmatch(part.stem):
            remove(part)
    for path in reversed(checkpoints(folder)):
        reason = damage(path)
        if not reason:
            return path
        aside = path.with_name(f'damaged_{path.name}')
        remove(aside)
        path.rename(aside)
        print(f'{path} is damaged ({reason}); it is {aside.name} now.', flush=True)
    if any(folder.glob('damaged_step_*')):  # of this call or of an earlier one
        raise ValueError(
            f'All checkpoints in {folder} are damaged; they are kept there. To start over, add --fresh or choose '
            'another --output-dir.'
        )
    return None


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, in words; '' where it is whole.

    Raises:
        OSError: A file is there and cannot be read, or holds code: then it may be whole.
    """
    try:
        sums = json.loads((path / 'checksums.json').read_text())
        if not isinstance(sums, dict) or 'state.pt' not in sums:
            return 'checksums.json does not name state.pt'
        for name, sum in sums.items():
            if digest(path / name) != sum:
                return f'{name} is not what was written'
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError) as error:
        return first_line(error)
    except OSError as error:
        raise OSError(
            f'The checkpoint {path} cannot be read ({error}). Nothing was changed. Let it be read and give the same '
            'command again; or move it away, and the command goes on from the checkpoint before.'
        ) from error
    try:
        state = read_state(path, look=True)
    except (RuntimeError, EOFError, ValueError) as error:
        return f'state.pt: {first_line(error)}'
    if not isinstance(state, dict) or state.get('precision') not in DTYPES:
        return 'state.pt is none that a run wrote'
    lacking = [name for name, keys in CONTENT.items() if not keys <= set(as_dict(state.get(name)))]
    return f'state.pt lacks {lacking[0]}, or a part of it' if lacking else ''


def as_dict(value: Any) -> dict[Any, Any]:
    """A dictionary, empty in the place of anything else."""
    return value if isinstance(value, dict) else {}


def read_state(path: Path, look: bool = False) -> dict[str, Any]:
    """The state of a whole checkpoint, without code.

    Args:
        path: The checkpoint.
        look: Tensors are not to be read, and stay on the disk.

    Raises:
        OSError: It holds code.
    """
    try:
        return torch.load(path / 'state.pt', map_location='cpu', weights_only=True, mmap=look)
    except pickle.UnpicklingError as error:
        raise OSError(refusal(path / 'state.pt', error)) from error


def load_shards(path: Path, shards: dict[str, Any]) -> None:
    """Fill what each process holds of a sharded checkpoint, in place and without code.

    Raises:
        OSError: It holds code.
    """
    reader = ShardReader(path / 'shards')
    reader.read_metadata()  # dcp.load itself would log a refusal as a missing file
    try:
        own_error(dcp.load, shards, storage_reader=reader, planner=ShardPlanner())
    except pickle.UnpicklingError as error:
        raise OSError(refusal(path / 'shards', error)) from error


def own_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function of PyTorch's distributed checkpoints; raise the first process's error, not a collection."""
    try:
        function(*args, **kwargs)
    except CheckpointException as errors:
        error, _ = next(iter(errors.failures.values()))
        raise error from errors


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0]


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, in types that load without code."""
    state: Any = np.random.get_state()  # numpy's annotation says tuple or dictionary: here it is the tuple
    version, keys, position, has_gauss, gauss = state
    return {
        'python': random.getstate(),
        'numpy': (version, keys.tolist(), position, has_gauss, gauss),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators back. Nothing in training depends on it: draws are keyed by (seed, epoch, index) or step."""
    version, numbers, gauss = states['python']
    random.setstate((version, tuple(numbers), gauss))
    version, keys, *rest = states['numpy']
    np.random.set_state((version, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states['torch'])
    if len(states['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states['cuda'])


def check_same_run(folder: Path, recipe: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError where a folder holds a run of other settings.

    The order of a stream depends on how many workers and processes read it; that of other sets does not.

    Args:
        folder: The output folder.
        recipe: The recipe that is to run, and how many `processes` run it.
        found: Those found in the folder.
    """
    recipe, found = json.loads(json.dumps(recipe)), json.loads(json.dumps(found))  # tuples as JSON keeps them
    found = Recipe().to_dict() | found  # of a run that is older than a setting
    for each in (recipe, found):
        as_dict(each.get('dataset_args')).pop('test_split', None)
        if each.get('parallel') == 'sequence':  # every process has the whole model, as with DDP
            each['parallel'] = 'ddp'
    free = FREE_TO_CHANGE if recipe['dataset'].startswith(STREAMS) else {*FREE_TO_CHANGE, 'workers', 'processes'}
    changed = [k for k in recipe if k not in free and found.get(k) != recipe[k]]
    if changed:
        words = '\n'.join(f'  {k}: {found.get(k)} there, {recipe[k]} now' for k in changed)
        raise ValueError(
            f'{folder} holds a run of other settings. Choose another --output-dir, give the settings that the folder '
            f'was made with, start over beside it with --fresh, or train its model further with --init {folder} '
            f'--output-dir OTHER. Nothing was changed.\n{words}'
        )


def check_same_images(folder: Path, images: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError where a folder holds a run on other training images.

    Args:
        folder: The output folder.
        images: The fingerprint of those that are there (`TrainingData.fingerprint`).
        found: That of the run; empty where it has none.
    """
    if found and images != found:
        there, now = found['num_images'], images['num_images']
        count = f'{there:,} there, {now:,} now' if there != now else f'{there:,}, of other names or classes'
        raise ValueError(
            f'{folder} holds a run on other training images ({count}). Nothing was changed. Which images train and '
            'which are kept apart depends on the files that there are: put them back, choose another --output-dir, or '
            'start over beside it with --fresh.'
        )
