"""What a plain ViT loses when it becomes a Linformer ViT, and how much of it a short distillation brings back.

    python -m scripts.studies.run conversion

A teacher (`recipes/fashion_mnist_vit.py`: full attention, 256 tokens) is converted with K of 64 and of 16, its E pooled
by area or fitted to the teacher's attention on images without labels. The fitted one then learns from the teacher by
`recipes/distill_from_vit.py`, and the same model learns from random weights for as many minutes, by the teacher's
recipe but at full size throughout (K = 64 of the 64 tokens of its first stage would be full attention). The learning
rate of distillation is chosen for each K on 5 % of the training images, which nothing before has seen; the test images
are for the scores alone. One seed. Writes `results/conversion.json`, and its table in `docs/results.md`.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import save_for_hf

from linvision.cli.images import ImagesOf
from linvision.cli.pretrained import load_vit
from linvision.convert import agreement, fit_projection, from_vit
from linvision.train.evaluate import evaluate
from linvision.train.model import resolved
from scripts.studies.tables import publish, table
from scripts.studies.trials import Flags, Trials, changed_recipe, run_folder

LENGTHS = {'K = 64': 64, 'K = 16': 16}
RATES = (5e-4, 2e-3)
TEACHER, DISTILLED, SCRATCH = 'teacher', 'distilled', 'from scratch'
VALIDATION = 0.05  # of the training images, by the runs' one seed


@dataclass
class Settings(Flags):
    """What the study can be asked.

    Args:
        teacher_epochs: Epochs of the teacher, which has as many threads as there are workers.
        epochs: Epochs of distillation.
        search: Length of the runs that choose its learning rate, as a share of those.
        steps: Steps of fitting E, a batch of 32 each.
        dataset: Name of the dataset.
    """

    teacher_epochs: float = 8.0
    epochs: float = 0.5
    search: float = 0.25
    steps: int = 200
    dataset: str = 'fashion_mnist'


def run_name(name: str, what: str) -> str:
    """What a run, or a conversion, of a K is called."""
    return f'{name}, {what}'


def convert(name: str, trials: Trials, settings: Settings) -> dict[str, Any]:
    """Convert the teacher, E pooled and then fitted; scores on the test images, by kind of E.

    Args:
        name: Of the K.
        trials: The runs, for their folder.
        settings: Data, and steps of fitting.

    Raises:
        ValueError: What is there was fitted otherwise.
    """
    folder = run_folder(trials.folder, run_name(name, 'converted'), 0)
    file, own = folder / 'conversion.json', {'dataset': settings.dataset, 'steps': settings.steps}
    if file.is_file():
        found = json.loads(file.read_text())
        if found['settings'] != own:
            raise ValueError(f'{folder} was made with {found["settings"]}, not {own}: name another --output-dir.')
        return found
    torch.manual_seed(0)
    teacher = load_vit(str(run_folder(trials.folder, TEACHER, 0)), '', 0)
    images = ImagesOf(teacher, settings.dataset, settings.data_dir, 32, torch.device('cpu'))
    converted = from_vit(teacher, LENGTHS[name])

    def scores() -> dict[str, Any]:
        agreed = agreement(converted, teacher, images.test(1000))
        return {**evaluate(converted, images.batches('test'), images.size), 'agreement': agreed}

    found = {'settings': own, 'pooled': scores()}
    errors = fit_projection(converted, teacher, images.training(VALIDATION), settings.steps)
    found |= {'fitted': scores(), 'attention_error': errors[:1] + errors[-1:]}
    save_for_hf(converted, str(folder), safe_serialization=True)
    file.write_text(json.dumps(found, indent=2) + '\n')
    return found


def student(name: str, trials: Trials) -> dict[str, str]:
    """Fields of a student that starts as the conversion."""
    converted = run_folder(trials.folder, run_name(name, 'converted'), 0)
    return {'init': str(converted), 'teacher': str(run_folder(trials.folder, TEACHER, 0))}


def from_scratch(name: str, trials: Trials, minutes: float) -> dict[str, Any]:
    """Fields of the same student with random weights, in the teacher's recipe at full size."""
    whole = resolved(changed_recipe('distill_from_vit', 0, student(name, trials))).to_dict()
    fields = {'model': whole['model'], 'model_args': whole['model_args'], 'max_minutes': minutes}
    return {**fields, 'stages': ((whole['img_size'], 1.0),)}


def conversion(settings: Settings) -> None:
    """What a plain ViT loses when it becomes a Linformer ViT, and how much a short distillation brings back."""
    trials = Trials('conversion', settings, dataset=settings.dataset, val_fraction=VALIDATION, device='cpu')
    teach = {TEACHER: {'epochs': settings.teacher_epochs, 'threads': settings.workers}}
    ((teacher,),) = trials.run('fashion_mnist_vit', teach).values()
    found = {name: convert(name, trials, settings) for name in LENGTHS}
    short = {name: {**student(name, trials), 'epochs': settings.search * settings.epochs} for name in LENGTHS}
    rates, scores = trials.choose_rates('distill_from_vit', short, dict.fromkeys(LENGTHS, RATES))
    own = {n: {**student(n, trials), 'lr': lr, 'epochs': settings.epochs} for n, lr in rates.items()}
    taught = trials.run('distill_from_vit', {run_name(n, DISTILLED): fields for n, fields in own.items()})
    minutes = {name: taught[run_name(name, DISTILLED)][0]['train_minutes'] for name in LENGTHS}
    alone = {run_name(name, SCRATCH): from_scratch(name, trials, minutes[name]) for name in LENGTHS}
    runs = taught | trials.run('fashion_mnist_vit', alone)
    for name in LENGTHS:
        found[name] |= {what: runs[run_name(name, what)][0] for what in (DISTILLED, SCRATCH)}
    given = {k: getattr(settings, k) for k in ('teacher_epochs', 'epochs', 'search', 'steps', 'precision')}
    result = {**given, 'rates': scores, 'teacher': teacher, 'students': found}
    publish('conversion', result, conversion_table(teacher, found))


def conversion_table(teacher: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """A line for the teacher and each K."""

    def top1(what: str) -> Any:
        return lambda key, rows: f'{100 * rows[key][what]["top1"]:.1f} %' if what in rows[key] else ''

    columns = {
        'K': lambda key, _: key.removeprefix('K = '),
        'E pooled': top1('pooled'),
        'E fitted': top1('fitted'),
        'then distilled': top1(DISTILLED),
        'from scratch, as long': top1(SCRATCH),
        'distillation, min': lambda key, rows: (
            f'{rows[key][DISTILLED]["train_minutes"]:.1f}' if DISTILLED in rows[key] else ''
        ),
    }
    return table(columns, {'N, the teacher': {'pooled': teacher}, **found})
