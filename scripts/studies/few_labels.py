"""What is the colour backbone worth where labels are few? CIFAR-10 with 10 to 1,000 images a class.

    python -m scripts.studies.run few_labels

The backbone has seen Tiny ImageNet; `recipes/finetune.py` trains it on the first images of each class, at 32×32 pixels
(256 tokens), or its head alone; from scratch is the same model with random weights and with Muon, which the package's
recipes train it with. The learning rate is chosen for each on 2,000 training images that no run learns from: the one
whose neighbours, three times as large and as small, are no better. The test images are for the scores alone. Writes
`results/few_labels.json` and its table in `docs/results.md` after each number of images; what runs gave is kept in
`results/few_labels_runs.json`, and they are not repeated.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from linvision.guard import end
from scripts.studies.tables import Cell
from scripts.studies.transfer import compare_starts
from scripts.studies.trials import Changes, SeedFlags, Trials

BACKBONE = 'linformer_vit_pico_patch2_64.tiny_imagenet'
STARTS: Changes = {
    'from scratch': {'model': 'linformer_vit_pico_patch2_64', 'init': '', 'layer_decay': 1.0, 'opt': 'muon'},
    'linear probe': {'init': BACKBONE, 'freeze': -1, 'layer_decay': 1.0},
    'fine-tuned': {'init': BACKBONE},
}
EPOCHS = {10: 100, 100: 15, 1000: 5}  # by training images a class
CHOSEN_ON = 200  # images a class


@dataclass
class Settings(SeedFlags):
    """What the study can be asked.

    Args:
        images: Training images a class.
    """

    images: tuple[int, ...] = tuple(EPOCHS)


def folders(cifar10: Path, where: Path, count: int) -> tuple[Path, Path]:
    """Folders of links with the first `count` images of each class to train on: scored on others, and on the test set.

    Args:
        cifar10: Folder that holds train/CLASS and test/CLASS.
        where: Receives the two folders.
        count: Training images a class.
    """
    if not (cifar10 / 'train').is_dir():
        end(f'{cifar10} holds no train/CLASS with images. --data-dir must hold cifar10/train and cifar10/test.')
    choice, test = where / f'choice_{count}', where / f'few_{count}'
    for folder in (choice, test):
        shutil.rmtree(folder, ignore_errors=True)  # links alone
    for source in sorted((cifar10 / 'train').iterdir()):
        files = sorted(source.iterdir())
        if len(files) < count + CHOSEN_ON:
            end(f'{source} has {len(files)} images; {count} to train on and {CHOSEN_ON} others are needed.')
        scored = sorted((cifar10 / 'test' / source.name).iterdir())
        for folder, val in ((choice, files[-CHOSEN_ON:]), (test, scored)):
            for split, images in (('train', files[:count]), ('val', val)):
                own = folder / split / source.name
                own.mkdir(parents=True)
                for image in images:
                    (own / image.name).symlink_to(image.resolve())
    return choice, test


def few_labels(settings: Settings) -> None:
    """What is the colour backbone worth where labels are few? CIFAR-10 with 10 to 1,000 images a class."""
    if unknown := set(settings.images) - set(EPOCHS):
        end(f'--images must be among {", ".join(map(str, EPOCHS))}, got {", ".join(map(str, sorted(unknown)))}.')
    common = {'img_size': 32, 'hflip': 0.5, 'shift': 2}
    trials = Trials('few_labels', settings, record='few_labels_runs.json', **common)

    def variants_of(count: int) -> tuple[Changes, Changes]:
        choice, test = folders(settings.data_dir.resolve() / 'cifar10', trials.folder / 'images', count)
        starts = {start: {**own, 'epochs': EPOCHS[count]} for start, own in STARTS.items()}
        tried, scored = ({s: {**own, 'data_dir': where} for s, own in starts.items()} for where in (choice, test))
        return tried, scored

    columns: dict[str, Cell] = {
        'images a class': lambda key, _: f'{key[0]:,}',
        'epochs': lambda key, _: str(EPOCHS[key[0]]),
    }
    facts = {'precision': settings.precision}
    compare_starts(trials, 'few_labels', settings.images, variants_of, columns, settings.seeds, facts, score='top1')
