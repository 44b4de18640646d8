"""Which backbone for pictures unlike those that it has seen? Clip art, from scratch and from both colour backbones.

    python -m scripts.tools.clipart_folder --output-dir data/clipart
    python -m scripts.studies.run clipart --data-dir data/clipart

`recipes/finetune.py` on 2,509 drawings of ten classes: the Tiny ImageNet backbone at 64×64 pixels and the CIFAR-10
backbone at 32×32, 1,024 tokens each; the head alone, with and without a batch norm before it; and the first of the two
with random weights and with Muon. The learning rate is chosen for each on a fifth of the training images, as in
`transfer.py`. Writes `results/clipart.json` and its table in `docs/results.md`; what runs gave is kept in
`results/clipart_runs.json`, and they are not repeated.
"""

from dataclasses import dataclass
from pathlib import Path

from scripts.studies.few_labels import BACKBONE
from scripts.studies.few_labels import STARTS as COLOUR
from scripts.studies.transfer import EPOCHS, compare_starts
from scripts.studies.trials import Changes, SeedFlags, Trials

LARGE = {'img_size': 64}
STARTS: Changes = {
    **{name: {**own, **LARGE} for name, own in COLOUR.items()},
    'linear probe, `head_norm`': {**COLOUR['linear probe'], **LARGE, 'model_args': {'head_norm': True}},
    'fine-tuned from CIFAR-10, 32×32': {'init': 'linformer_vit_pico_patch1_32.cifar10', 'img_size': 32},
}


@dataclass
class Settings(SeedFlags):
    """What the study can be asked.

    Args:
        epochs: Numbers of epochs.
    """

    epochs: tuple[int, ...] = (6,)
    data_dir: Path = Path('data/clipart')


def clipart(settings: Settings) -> None:
    """Which backbone for pictures unlike those that it has seen? Clip art, from scratch and from both backbones."""
    trials = Trials('clipart', settings, record='clipart_runs.json', hflip=0.5, shift=2)

    def variants_of(epochs: int) -> tuple[Changes, Changes]:
        variants = {start: {**own, 'epochs': epochs} for start, own in STARTS.items()}
        return {start: {**own, 'val_fraction': 0.2} for start, own in variants.items()}, variants

    facts = {'backbone': BACKBONE, 'precision': settings.precision}
    compare_starts(trials, 'clipart', settings.epochs, variants_of, EPOCHS, settings.seeds, facts)
