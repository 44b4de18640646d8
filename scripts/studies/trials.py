"""Runs of one recipe with one thing changed, over seeds, in processes of their own: what studies are made of.

What a run gave can be kept in a file of the repository (`Record`), so that a study goes on where it was left, on
another machine too, and nobody has to repeat hours of training to add a seed.
"""

import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from linvision.train import Recipe, train
from linvision.train.checkpoint import FREE_TO_CHANGE
from scripts import ROOT
from scripts.studies.tables import RESULTS

MACHINE = ('threads', 'versions', 'device')  # a run's own: a study can be made on several
FIGURES = ('top1', 'val_top1', 'num_samples', 'images_seen', 'train_minutes', 'num_parameters', 'tokens', 'seed')
Changes = dict[str, dict[str, Any]]  # fields of the recipe that differ, by what the variant is called
Scores = dict[str, dict[float, float]]  # by variant and learning rate


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
    score = next(field for field in ('top1', 'val_top1', 'loss', 'val_loss') if field in metrics)
    print(f'{name}, seed {seed}: {score} {metrics[score]:.4f}, {metrics["images_seen"]:,} images', flush=True)
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
        whole = changed_recipe(recipe, seed, settings).to_dict()
        own = {k: v for k, v in whole.items() if k not in FREE_TO_CHANGE or k == 'test'}
        if not own['native_sizes']:  # which is younger than most of what is kept
            del own['native_sizes']
        if whole['dataset'] == 'image_folder':  # there the folder is the data
            images = Path(whole['data_dir'])
            own['images'] = [images.name, sum(1 for _ in images.rglob('*.*'))]
        return json.loads(json.dumps({'format': self.FORMAT, 'recipe': recipe, **own}))

    def read(self) -> list[dict[str, Any]]:
        """All that is kept."""
        return json.loads(self.path.read_text()) if self.path.is_file() else []

    def find(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The figures of a run, if it was made."""
        return None if self.again else next((run['found'] for run in self.read() if run['asked'] == asked), None)

    def keep(self, asked: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Add a run; the file is whole at any moment, and two studies may write to it."""
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


@dataclass
class Flags:
    """What every study can be asked; each has defaults of its own, and may have more.

    Args:
        workers: Runs at a time, one thread each.
        precision: Of every run.
        data_dir: Folder that holds the data.
        output_dir: Folder for the runs, below it one for each study; finished runs are not repeated.
    """

    workers: int = 2
    precision: Literal['fp32', 'bf16'] = 'fp32'
    data_dir: Path = Path('data')
    output_dir: Path = Path('outputs')


@dataclass
class SeedFlags(Flags):
    """Those of a study with several runs of each variant.

    Args:
        seeds: Runs of each variant.
        again: Make every run anew, whatever is finished or kept.
    """

    seeds: int = 3
    again: bool = False


class Trials:
    """The runs of a study, one thread each.

    Args:
        study: Its name, which is that of its folder.
        flags: What was asked for.
        fields: Names of the metrics that are given back of a run, beside those of the machine.
        record: File in `results/`: runs that stand there are not repeated, others are added once they are finished.
        common: Fields of the recipe in which all runs differ from it.
    """

    def __init__(
        self, study: str, flags: Flags, fields: tuple[str, ...] = FIGURES, record: str = '', **common: Any
    ) -> None:
        self.folder, self.workers, self.fields = (flags.output_dir / study).resolve(), flags.workers, fields
        self.common = {'data_dir': flags.data_dir.resolve(), 'precision': flags.precision, 'threads': 1, **common}
        self.again = isinstance(flags, SeedFlags) and flags.again
        self.record = Record(RESULTS / record, fields, self.again) if record else None

    def run(
        self,
        recipe: str,
        variants: Changes,
        seeds: Iterable[int] = (0,),
        folder: str = '',
        before: dict[str, Callable[[], None]] | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """All variants with all seeds, by seed, so that all variants meet the same conditions.

        Args:
            recipe: Name of the file in `recipes/`.
            variants: Fields that differ, by name.
            seeds: Of the runs of each.
            folder: Where the runs' own folders go, in that of the study.
            before: What is called first in a variant's process, by name.

        Returns:
            Metrics by name, one of each seed.
        """
        changed, record = {name: {**self.common, **own} for name, own in variants.items()}, self.record
        jobs = [(name, seed) for seed in seeds for name in changed]
        asked = {(name, seed): record.asked(recipe, seed, changed[name]) for name, seed in jobs} if record else {}
        found = {job: run for job, what in asked.items() if (run := record.find(what)) is not None}
        if self.again:
            changed = {name: {**fields, 'fresh': True} for name, fields in changed.items()}
        where, first = self.folder / folder, before or {}
        context = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(self.workers, context, max_tasks_per_child=1) as pool:
            runs = {
                pool.submit(trial, recipe, name, seed, changed[name], where, first.get(name)): (name, seed)
                for name, seed in jobs
                if (name, seed) not in found
            }
            for run in as_completed(runs):
                if run.exception() is None:  # one that failed loses nothing of the others
                    found[runs[run]] = run.result()
                    if record:
                        record.keep(asked[runs[run]], run.result())
            for run in runs:
                run.result()
        kept = (*self.fields, *MACHINE)
        return {
            name: [{k: found[job][k] for k in kept if k in found[job]} for job in jobs if job[0] == name]
            for name in variants
        }

    def choose_rates(
        self,
        recipe: str,
        variants: Changes,
        first: dict[str, Iterable[float]],
        around: Callable[[float], Iterable[float]] = lambda lr: (),
        best: Callable[[dict[float, float]], float] = lambda scores: max(scores, key=scores.get),
        known: Scores | None = None,
        folder: str = 'rates',
        score: str = 'val_top1',
    ) -> tuple[dict[str, float], Scores]:
        """The learning rate of each variant by validation images, one seed; the test set is not touched.

        Args:
            recipe: Name of the file in `recipes/`.
            variants: Fields that differ, by name.
            first: Rates to begin with, by name.
            around: Rates that must have been tried before one is taken.
            best: The rate that scores speak for.
            known: Scores that need no run.
            folder: Where the runs' own folders go, in that of the study.
            score: Of the validation slice; 'top1' where what the variants score on is no test set.

        Returns:
            The rate of each, and all scores.
        """
        scores: Scores = {name: dict((known or {}).get(name, {})) for name in variants}
        asked = [(name, lr) for name, rates in first.items() for lr in rates if lr not in scores[name]]
        while True:
            names = {f'{name}, lr {lr:g}': (name, lr) for name, lr in asked}
            tried = {
                title: {**variants[name], 'lr': lr, 'test': score == 'top1'} for title, (name, lr) in names.items()
            }
            for title, (run,) in (self.run(recipe, tried, folder=folder) if tried else {}).items():
                name, lr = names[title]
                scores[name][lr] = run[score]
            chosen = {name: best(found) for name, found in scores.items()}
            asked = [(name, lr) for name, rate in chosen.items() for lr in around(rate) if lr not in scores[name]]
            if not asked:
                return chosen, {name: dict(sorted(found.items())) for name, found in scores.items()}
