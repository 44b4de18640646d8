"""What a plain ViT loses when it becomes a Linformer ViT, and how much of it a short distillation brings back.

    python scripts/compare_conversion.py

A teacher (`recipes/fashion_mnist_vit.py`: full attention, 256 tokens) is converted with K of 64 and of 16, its E pooled
by area or fitted to the teacher's attention on images without labels. The fitted one then learns from the teacher by
`recipes/distill_from_vit.py`, and the same model learns from random weights for as many minutes, by the teacher's
recipe but at full size throughout (K = 64 of the 64 tokens of its first stage would be full attention). The learning
rate of distillation is chosen for each K on 5 % of the training images, which nothing before has seen; the test images
are for the scores alone. Writes `docs/results/conversion.json`, and its table in
`docs/results.md`.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from timm.models import save_for_hf

from convert_vit import ImagesOf, load_vit
from linvision.convert import agreement, fit_projection, from_vit
from linvision.train import Recipe
from linvision.train.evaluate import evaluate
from linvision.train.metrics import machine
from linvision.train.model import resolved
from trials import ROOT, run_folder, run_trials, write_table

LENGTHS = (64, 16)
RATES = (5e-4, 2e-3)
TEACHER, DISTILLED, SCRATCH = 'teacher', 'distilled', 'from scratch'
VALIDATION = 0.05  # of the training images, by the runs' one seed
FIELDS = ('top1', 'val_top1', 'num_samples', 'images_seen', 'train_minutes', 'num_parameters', 'tokens', 'seed')


class Comparison:
    """Runs that share their settings.

    Args:
        dataset: Name of the dataset.
        data_dir: Folder that holds it.
        output_dir: Folder for the runs; finished ones are not repeated.
        workers: Runs at a time, one thread each.
        precision: Of every run.
    """

    def __init__(self, dataset: str, data_dir: Path, output_dir: Path, workers: int, precision: str) -> None:
        self.dataset, self.data_dir = dataset, data_dir.resolve()
        self.folder, self.workers = output_dir.resolve(), workers
        self.common = {'dataset': dataset, 'data_dir': self.data_dir, 'precision': precision, 'threads': 1}
        self.common |= {'val_fraction': VALIDATION, 'device': 'cpu'}

    def run(self, recipe: str, variants: dict[str, dict[str, Any]], folder: str = '') -> dict[str, dict[str, Any]]:
        """Metrics of each variant, one seed: the slice that is kept apart is the same in all."""
        settings = {name: self.common | changed for name, changed in variants.items()}
        runs = run_trials(recipe, settings, [0], self.workers, self.folder / folder)
        return {name: run for name, (run,) in runs.items()}

    def where(self, name: str) -> Path:
        """Output folder of a run, or of a conversion."""
        return run_folder(self.folder, name, 0)

    def convert(self, K: int, steps: int) -> dict[str, Any]:
        """Convert the teacher, E pooled and then fitted; scores on the test images, by kind of E.

        Args:
            K: Projected rows.
            steps: Steps of fitting, a batch of 32 each.

        Raises:
            ValueError: What is there was fitted otherwise.
        """
        file, own = self.where(f'K = {K}, converted') / 'conversion.json', {'dataset': self.dataset, 'steps': steps}
        if file.is_file():
            found = json.loads(file.read_text())
            if found['settings'] != own:
                raise ValueError(f'{file.parent} was made with {found["settings"]}, not {own}: name another folder.')
            return found
        torch.manual_seed(0)
        teacher = load_vit(str(self.where(TEACHER)), '', 0)
        images = ImagesOf(teacher, self.dataset, self.data_dir, 32, torch.device('cpu'))
        converted = from_vit(teacher, K)

        def scores() -> dict[str, Any]:
            agreed = agreement(converted, teacher, images.test(1000))
            return {**evaluate(converted, images.batches('test'), images.size), 'agreement': agreed}

        found = {'settings': own, 'pooled': scores()}
        errors = fit_projection(converted, teacher, images.training(VALIDATION), steps)
        found |= {'fitted': scores(), 'attention_error': errors[:1] + errors[-1:]}
        save_for_hf(converted, str(file.parent), safe_serialization=True)
        file.write_text(json.dumps(found, indent=2) + '\n')
        return found

    def distilled(self, K: int) -> dict[str, str]:
        """Fields of a student that starts as the conversion."""
        return {'init': str(self.where(f'K = {K}, converted')), 'teacher': str(self.where(TEACHER))}

    def choose_rates(self, epochs: float) -> dict[int, dict[float, float]]:
        """Validation scores by K and learning rate of distillation."""
        own = {'epochs': epochs, 'test': False}
        tried = {f'K = {K}, lr {lr:g}': {**self.distilled(K), 'lr': lr, **own} for K in LENGTHS for lr in RATES}
        runs = self.run('distill_from_vit', tried, 'rates')
        return {K: {lr: runs[f'K = {K}, lr {lr:g}']['val_top1'] for lr in RATES} for K in LENGTHS}

    def scratch(self, K: int, minutes: float) -> dict[str, Any]:
        """Fields of the same student with random weights, in the teacher's recipe at full size."""
        student = resolved(Recipe().replace(model='', **self.distilled(K)))
        fields = {'model': student.model, 'model_args': student.model_args, 'max_minutes': minutes}
        return {**fields, 'stages': ((student.data.img_size, 1.0),)}


def table(teacher: dict[str, Any], found: dict[int, dict[str, Any]]) -> str:
    """A line for the teacher and each K."""
    lines = [
        '| K | E pooled | E fitted | then distilled | from scratch, as long | distillation, min |',
        '| --- | --- | --- | --- | --- | --- |',
        f'| N, the teacher | {100 * teacher["top1"]:.1f} % | | | | |',
    ]
    for K, of in found.items():
        tops = [of[name]['top1'] for name in ('pooled', 'fitted', DISTILLED, SCRATCH)]
        cells = ' | '.join(f'{100 * top1:.1f} %' for top1 in tops)
        lines.append(f'| {K} | {cells} | {of[DISTILLED]["train_minutes"]:.1f} |')
    return '\n'.join(lines)


def main(
    teacher_epochs: float = 8.0,
    epochs: float = 0.5,
    search: float = 0.25,
    steps: int = 200,
    workers: int = 2,
    precision: Literal['fp32', 'bf16'] = 'fp32',
    dataset: str = 'fashion_mnist',
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/conversion'),
) -> None:
    """Run the comparison.

    Args:
        teacher_epochs: Epochs of the teacher, which has as many threads as there are workers.
        epochs: Epochs of distillation.
        search: Length of the runs that choose its learning rate, as a share of those.
        steps: Steps of fitting E, a batch each.
        workers: Runs at a time, one thread each.
        precision: Of every run.
        dataset: Name of the dataset.
        data_dir: Folder that holds it.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    comparison = Comparison(dataset, data_dir, output_dir, workers, precision)
    teacher = comparison.run('fashion_mnist_vit', {TEACHER: {'epochs': teacher_epochs, 'threads': workers}})[TEACHER]
    found = {K: comparison.convert(K, steps) for K in LENGTHS}
    validation = comparison.choose_rates(search * epochs)
    rates = {K: max(scores, key=scores.get) for K, scores in validation.items()}
    names = {K: f'K = {K}, {DISTILLED}' for K in LENGTHS}
    runs = comparison.run(
        'distill_from_vit',
        {names[K]: {**comparison.distilled(K), 'lr': rates[K], 'epochs': epochs} for K in LENGTHS},
    )
    others = comparison.run(
        'fashion_mnist_vit',
        {f'K = {K}, {SCRATCH}': comparison.scratch(K, runs[names[K]]['train_minutes']) for K in LENGTHS},
    )
    for K in LENGTHS:
        for name, run in ((DISTILLED, runs[names[K]]), (SCRATCH, others[f'K = {K}, {SCRATCH}'])):
            found[K][name] = {k: run[k] for k in FIELDS if k in run}
    settings = {'epochs': epochs, 'search': search, 'steps': steps, 'precision': precision, 'rates': validation}
    whole = {'teacher': {k: teacher[k] for k in FIELDS if k in teacher}, 'students': found}
    result = {'teacher_epochs': teacher_epochs, **settings, **machine(torch.device('cpu')), **whole}
    (ROOT / 'docs' / 'results').mkdir(exist_ok=True)
    (ROOT / 'docs' / 'results' / 'conversion.json').write_text(json.dumps(result, indent=2) + '\n')
    lines = table(teacher, found)
    write_table('conversion', lines)
    print(lines)


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
