"""Runs of one recipe with one thing changed, over seeds, in processes of their own: what comparisons are made of.

What a run gave can be kept in a file of the repository (`Record`), so that a comparison goes on where it was left, on
another machine too, and nobody has to repeat hours of training to add a seed.
"""

import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

from linvision.train import Recipe, train
from linvision.train.checkpoint import FREE_TO_CHANGE

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ('threads', 'versions', 'device')  # a run's own: a comparison can be made on several


def recipe_module(name: str) -> ModuleType:
    """A file in `recipes/`; it may import those beside it, as it does when it is run."""
    folder = str(ROOT / 'recipes')
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def changed_recipe(recipe: str, seed: int, settings: dict[str, Any]) -> Recipe:
    """The recipe of a file in `recipes/`, with a seed and with fields that differ."""
    return recipe_module(recipe).RECIPE.replace(seed=seed, **settings)


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Output folder of a variant's run."""
    return folder / f'{name.replace(" ", "_")}_{seed}'


def trial(
    recipe: str, name: str, seed: int, settings: dict[str, Any], folder: Path, before: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Train one variant with one seed; its metrics.

    Args:
        recipe: Name of the file in `recipes/`.
        name: Name of the variant.
        seed: The seed.
        settings: Fields of the recipe that differ.
        folder: Where the output folder goes; a run that is finished there is not repeated.
        before: Called first, to change what is no field.
    """
    if before is not None:
        before()
    output_dir = run_folder(folder, name, seed)
    changed = changed_recipe(recipe, seed, settings).replace(output_dir=output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / 'log.txt').open('a') as log, contextlib.redirect_stdout(log):
        metrics = train(changed)
    field = next(field for field in ('top1', 'val_top1', 'loss', 'val_loss') if field in metrics)
    print(f'{name}, seed {seed}: {field} {metrics[field]:.4f}, {metrics["images_seen"]:,} images', flush=True)
    return metrics


class Record:
    """Figures of finished runs by what was trained, in a JSON file with a line for each.

    A run is known by every field of its recipe that matters to what it learns, so that a changed recipe is another run;
    a changed model or loop is not seen: raise `FORMAT` for one that changes results.

    Args:
        path: The file.
        fields: Names of the metrics that are kept.
        again: Find nothing; what is kept replaces what was there.
    """

    FORMAT = 1

    def __init__(self, path: Path, fields: Iterable[str], again: bool = False) -> None:
        self.path, self.again = path, again
        self.fields = (*fields, *MACHINE)

    def asked(self, recipe: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
        """What says which run it is."""
        whole = changed_recipe(recipe, seed, settings)
        own = {k: v for k, v in whole.to_dict().items() if k not in FREE_TO_CHANGE or k == 'test'}
        if whole.data.dataset == 'image_folder':  # there the folder is the data
            own['images'] = [Path(whole.data.data_dir).name, sum(1 for _ in Path(whole.data.data_dir).rglob('*.*'))]
        return json.loads(json.dumps({'format': self.FORMAT, 'recipe': recipe, **own}))

    def read(self) -> list[dict[str, Any]]:
        """All that is kept."""
        return json.loads(self.path.read_text()) if self.path.is_file() else []

    def find(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The figures of a run, if it was made."""
        return None if self.again else next((run['found'] for run in self.read() if run['asked'] == asked), None)

    def keep(self, asked: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Add a run; the file is whole at any moment, and two scripts may write to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
            runs = [run for run in self.read() if run['asked'] != asked]
            runs.append({'asked': asked, 'found': {k: metrics[k] for k in self.fields if k in metrics}})
            part = self.path.with_suffix('.part')
            part.write_text('[\n' + ',\n'.join(json.dumps(run) for run in runs) + '\n]\n')
            os.replace(part, self.path)
        finally:
            os.close(folder)


def run_trials(
    recipe: str,
    variants: dict[str, dict[str, Any]],
    seeds: Iterable[int],
    workers: int,
    folder: Path,
    before: dict[str, Callable[[], None]] | None = None,
    record: Record | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """All variants with all seeds, by seed, so that all variants meet the same conditions.

    Args:
        recipe: Name of the file in `recipes/`.
        variants: Settings by name.
        seeds: Of the runs of each.
        workers: Runs at a time.
        folder: Where output folders go.
        before: What is called first in a variant's process, by name.
        record: Runs that stand there are not repeated; others are added once they are finished.

    Returns:
        Metrics by name, one of each seed.
    """
    jobs = [(name, seed) for seed in seeds for name in variants]
    asked = {(name, seed): record.asked(recipe, seed, variants[name]) for name, seed in jobs} if record else {}
    found = {job: run for job, what in asked.items() if (run := record.find(what)) is not None}
    if record and record.again:
        variants = {name: {**fields, 'fresh': True} for name, fields in variants.items()}
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        runs = {
            pool.submit(trial, recipe, name, seed, variants[name], folder.resolve(), (before or {}).get(name)): (
                name,
                seed,
            )
            for name, seed in jobs
            if (name, seed) not in found
        }
        for run in as_completed(runs):
            job = runs[run]
            if run.exception() is None:  # one that failed loses nothing of the others
                found[job] = run.result()
                if record:
                    record.keep(asked[job], found[job])
        for run in runs:
            run.result()
    return {name: [found[job] for job in jobs if job[0] == name] for name in variants}


def mean_and_spread(values: list[float]) -> str:
    """The mean, and the standard deviation where there are several: '83.2 ± 1.1'."""
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'


def write_table(name: str, table: str, page: Path | None = None) -> None:
    """Put a table between its marks, `<!-- NAME -->` and `<!-- /NAME -->`, in a page (`docs/results.md` by default).

    Raises:
        ValueError: The page has no such marks.
    """
    page = page or ROOT / 'docs' / 'results.md'
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    before, found, rest = page.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f'{page} has no place for the table: {start} and {end} on lines of their own.')
    page.write_text(f'{before}{start}\n{table}\n{end}{after}')
