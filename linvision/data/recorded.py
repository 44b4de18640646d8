"""The data of a run as its folder tells of it (`metrics.json`), and what of that is believed.

A folder may come from a stranger. What it says may choose among the sets that we read ourselves, in folders of this
machine; it never chooses one that timm opens, which may be fetched, streamed or printed by a command, and names no URL.
"""

import json
from pathlib import Path
from typing import Any

from linvision.data.timm_sets import PREFIXES

RESERVED = {'name', 'root', 'split', 'download'}  # of create_dataset itself


def read_metrics(path: Path) -> dict[str, Any]:
    """The contents of a run's `metrics.json`.

    Raises:
        ValueError: It is damaged or none; what is to be done is the caller's to add.
    """
    try:
        found = json.loads(path.read_text())
    except IsADirectoryError:
        raise ValueError(f'{path} is a folder, where a run writes a file.') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged ({str(error).splitlines()[0]}).') from error
    if not isinstance(found, dict) or not isinstance(found.get('recipe'), dict):
        raise ValueError(f'{path} is damaged (it holds no recipe).')
    return found


def recorded_data(
    folder: Path,
    metrics: dict[str, Any],
    dataset: str = '',
    data_dir: Path | None = None,
    dataset_args: dict[str, Any] | None = None,
) -> tuple[str, Path, dict[str, Any]]:
    """What a command is to read that was given a folder: what the user names, and the rest as the folder tells.

    Args:
        folder: The folder, for errors.
        metrics: The contents of its `metrics.json`; empty where there is none.
        dataset: The user's data set; '' for the folder's.
        data_dir: The user's root; None for the folder's with its own data set, `data` with another.
        dataset_args: The user's arguments of the set, over those of the folder with its own data set.

    Returns:
        Arguments of `create_dataset`: name, root, and further ones.

    Raises:
        ValueError: Neither names a set, or the folder asks for what the user alone may ask for.
    """
    recipe, arguments = metrics.get('recipe') or {}, dict(dataset_args or {})
    if not recipe and not dataset:
        raise ValueError(f'{folder} has no metrics.json that names its data: say --dataset and --data-dir.')
    if not recipe:
        return dataset, data_dir or Path('data'), arguments
    name, root, theirs = (recipe.get(field, {}) for field in ('dataset', 'data_dir', 'dataset_args'))
    if not (isinstance(name, str) and isinstance(root, str) and isinstance(theirs, dict)):
        raise ValueError(
            f'The metrics.json of {folder} is none that a run wrote: its recipe has dataset {name!r}, data_dir '
            f'{root!r} and dataset_args {theirs!r}. Take the model alone, without that file.'
        )
    if dataset not in ('', name):
        return dataset, data_dir or Path('data'), arguments
    if name.lower().startswith(PREFIXES):
        if dataset and data_dir is not None:
            return dataset, data_dir, arguments
        raise ValueError(
            f'The metrics.json of {folder} asks for the data set {name!r} in {root!r}, with {theirs}. Such sets may be '
            'fetched or made by commands, and a folder alone does not decide that: if this is what you want, name all '
            'of it yourself, by --dataset, --data-dir and --dataset-args.'
        )
    if data_dir is None and ':' in root:
        raise ValueError(
            f'The metrics.json of {folder} asks for data in {root!r}, which may be a URL or a command, and a folder '
            f'alone does not decide that: say --dataset {name} and --data-dir FOLDER.'
        )
    taken = {k: v for k, v in theirs.items() if k not in arguments}
    odd = [k for k, v in taken.items() if k in RESERVED or not isinstance(v, int | float | str) or ':' in str(v)]
    if odd:
        raise ValueError(
            f'The metrics.json of {folder} asks for the data set {name!r} with {odd[0]} = {taken[odd[0]]!r}, and a '
            f'folder alone does not decide that: say --dataset {name}, --data-dir FOLDER and --dataset-args {odd[0]} '
            'VALUE.'
        )
    return name, data_dir or Path(root), taken | arguments
