"""Runs of one recipe with one thing changed, over seeds, in processes of their own: what comparisons are made of."""

import contextlib
import dataclasses
import multiprocessing
import runpy
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from linvision.train import Recipe, train

ROOT = Path(__file__).resolve().parent.parent


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
    base: Recipe = runpy.run_path(str(ROOT / 'recipes' / f'{recipe}.py'))['RECIPE']
    output_dir = folder / f'{name.replace(" ", "_")}_{seed}'
    changed = dataclasses.replace(base, output_dir=output_dir, seed=seed, **settings)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / 'log.txt').open('a') as log, contextlib.redirect_stdout(log):
        metrics = train(changed)
    field = next(field for field in ('top1', 'val_top1', 'loss', 'val_loss') if field in metrics)
    print(f'{name}, seed {seed}: {field} {metrics[field]:.4f}, {metrics["images_seen"]:,} images', flush=True)
    return metrics


def run_trials(
    recipe: str,
    variants: dict[str, dict[str, Any]],
    seeds: Iterable[int],
    workers: int,
    folder: Path,
    before: dict[str, Callable[[], None]] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """All variants with all seeds, by seed, so that all variants meet the same conditions.

    Args:
        recipe: Name of the file in `recipes/`.
        variants: Settings by name.
        seeds: Of the runs of each.
        workers: Runs at a time.
        folder: Where output folders go.
        before: What is called first in a variant's process, by name.

    Returns:
        Metrics by name, one of each seed.
    """
    jobs = [(name, seed) for seed in seeds for name in variants]
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        runs = [
            pool.submit(trial, recipe, name, seed, variants[name], folder.resolve(), (before or {}).get(name))
            for name, seed in jobs
        ]
    return {name: [run.result() for job, run in zip(jobs, runs, strict=True) if job[0] == name] for name in variants}


def mean_and_spread(values: list[float]) -> str:
    """The mean, and the standard deviation where there are several: '83.2 ± 1.1'."""
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'


def write_table(name: str, table: str) -> None:
    """Put a table between its marks in `docs/results.md`: `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: The page has no such marks.
    """
    page = ROOT / 'docs' / 'results.md'
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    before, found, rest = page.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f'{page} has no place for the table: {start} and {end} on lines of their own.')
    page.write_text(f'{before}{start}\n{table}\n{end}{after}')
