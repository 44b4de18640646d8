"""Studies of one thing changed: a recipe, what each line of a table changes, and how long the runs of a table are.

    python -m scripts.studies.run choices --lengths model 2 stages 4
    python -m scripts.studies.run patches --lengths minutes 2 epochs 0.5 --seeds 2
    python -m scripts.studies.run norms

`--lengths` takes another length for a table, minutes or epochs as the table has it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from linvision.models.projection import Projection
from linvision.models.resize import area_matrix
from scripts.studies.tables import DOCS, Rows, publish, table
from scripts.studies.trials import FIGURES, Changes, SeedFlags, Trials, recipe_module


@dataclass(frozen=True)
class Table:
    """Runs that are equally long.

    Args:
        title: Of the first column.
        variants: What is changed, by line.
        unit: Field of the recipe that says how long runs are, `epochs` or `max_minutes`.
        length: How long they are unless `--lengths` says otherwise.
        columns: Titles of the others, which name their cells.
    """

    title: str
    variants: Changes
    unit: str
    length: float
    columns: tuple[str, ...]


@dataclass
class Settings(SeedFlags):
    """What a study of one thing changed can be asked.

    Args:
        lengths: Minutes or epochs of each run of a table, by the table's name.
    """

    lengths: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Tables of runs of one recipe.

    Args:
        question: What it is to answer.
        recipe: Name of the file in `recipes/`.
        page: Page of `docs/` that has the tables between marks of their names.
        common: Fields in which all runs differ from the recipe.
        tables: The tables by name.
        flags: Defaults of the command's flags.
        before: What is called first in a variant's process, by name.
        record: File in `results/` that keeps what runs gave.
        draw: Draws a picture of the tables' runs.
    """

    question: str
    recipe: str
    page: str
    common: dict[str, Any]
    tables: dict[str, Table]
    flags: Settings
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    record: str = ''
    draw: Callable[[dict[str, Rows]], None] | None = None


def run(name: str, settings: Settings) -> None:
    """Train what a study's tables ask for, and write them.

    Args:
        name: Of the study.
        settings: How long, how often, where.

    Raises:
        ValueError: A length is of no table.
    """
    study = STUDIES[name]
    if unknown := sorted(set(settings.lengths) - set(study.tables)):
        raise ValueError(f'The tables of {name} are {", ".join(study.tables)}; a length was given of {unknown}.')
    trials = Trials(name, settings, (*FIGURES, 'val_loss', 'val_num_samples'), study.record, **study.common)
    lengths = {mark: settings.lengths.get(mark, of.length) for mark, of in study.tables.items()}
    found: dict[str, Rows] = {}
    for mark, of in study.tables.items():
        variants = {line: {of.unit: lengths[mark], **changed} for line, changed in of.variants.items()}
        found[mark] = trials.run(study.recipe, variants, range(settings.seeds), mark, study.before)
    for mark, of in study.tables.items():
        columns = {of.title: lambda key, _: key, **dict.fromkeys((*of.columns, 'seeds'))}
        publish(name, {'lengths': lengths, 'runs': found}, table(columns, found[mark]), study.page, mark)
    if study.draw:
        study.draw(found)


# ------------------------------------------------------------------------------- choices of the pixel models' recipe
def block_means() -> None:
    """Let every factor of E start as the means of equal blocks, plus the noise that sets the rows apart."""

    @torch.no_grad()
    def init_weights(self: Projection) -> None:
        for weight in self.weights:
            K, n = weight.shape
            weight.copy_(area_matrix(n, K, weight) * K / n + 0.01 * torch.randn_like(weight))

    Projection.init_weights = init_weights


def at_16(**model_args: Any) -> dict[str, Any]:
    """16×16 images, and arguments of the model, which has no norm after E unless one is asked for."""
    return {'stages': ((16, 1.0),), 'model_args': {'row_norm': False, **model_args}}


VALIDATED = ('validation top-1', 'images seen', 'parameters')
CHOICES = Study(
    question='Why the pixel models and their recipe are as they are: each choice against others, at equal time.',
    recipe='fashion_mnist_pixels',
    page='choices.md',
    common={'val_fraction': 0.05, 'test': False},
    tables={
        'model': Table(
            'one change',
            {
                'separable E, conv positions, local path, Muon': at_16(),
                'linear E': at_16(projection='linear'),
                'full attention': at_16(projection='none'),
                'E starts as block means': at_16(),
                'layer norm after E (as registered)': at_16(row_norm=True),
                'queries and keys normalised': at_16(qk_norm=True),
                'separable positions': at_16(pos_embed='separable'),
                'no local path': at_16(local_size=0),
                'AdamW, lr 3e-3': {'opt': 'adamw', 'lr': 3e-3, **at_16()},
            },
            'max_minutes',
            2.0,
            VALIDATED,
        ),
        'stages': Table(
            'stages',
            {
                f'{share:.0%} of the time at 16×16': {'stages': ((16, share), (32, 1 - share))}
                for share in (0.75, 0.5, 0.25)
            },
            'max_minutes',
            5.0,
            VALIDATED,
        ),
    },
    flags=Settings(precision='bf16'),
    before={'E starts as block means': block_means},
)


# ---------------------------------------------------------------------------------------------------------- patches
def draw_patches(found: dict[str, Rows]) -> None:
    """Top-1 of every run against tokens, one panel for equal time and one for equal epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout='constrained')
    for axis, (equal, rows) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        for name, runs in rows.items():
            axis.plot([run['tokens'] for run in runs], [100 * run['top1'] for run in runs], 'o', label=name, alpha=0.7)
        axis.set(title=f'equal {equal}, one thread', xlabel='tokens', xscale='log')
        axis.set_xticks([64, 256, 1024], ['64', '256', '1,024'])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.axes[0].set_ylabel('top-1, % of 10,000 test images')
    figure.savefig(DOCS / 'images' / 'patches.png', dpi=120)


PATCH_SIZES: Changes = {f'patch {p}': {'model': f'linformer_vit_pico_patch{p}_32'} for p in (1, 2, 4)}
TESTED = ('tokens', 'top-1', 'images seen', 'parameters')
PATCHES = Study(
    question='Do pixels pay? Patches of 1, 2 and 4 pixels on Fashion-MNIST, at equal time and at equal epochs.',
    recipe='fashion_mnist_pixels',
    page='patches.md',
    common={'stages': ()},  # so that the patch size alone changes: 1,024, 256 and 64 tokens, K = 64, 64 and 16
    tables={
        'minutes': Table('equal time', PATCH_SIZES, 'max_minutes', 4.0, TESTED),
        'epochs': Table('equal epochs', PATCH_SIZES, 'epochs', 0.5, TESTED),
    },
    flags=Settings(precision='bf16'),
    draw=draw_patches,
)


# ------------------------------------------------------------------------------------------------- norms for Pathfinder
def with_own(recipe: str, **changed: Any) -> dict[str, Any]:
    """Arguments of a recipe's model, some of them changed."""
    return {'model_args': recipe_module(recipe).RECIPE.to_dict()['model_args'] | changed}


PICO = 'pathfinder_1k_pico'
NORMS = Study(
    question='What makes a pixel transformer leave chance on Pathfinder? Its recipe, with one thing changed, and all.',
    recipe=PICO,
    page='pathfinder.md',
    # its images at half their size, 256 tokens
    common={'max_minutes': 0.0, 'stages': ((16, 1.0),), 'eval_every': 0.0, 'test': False},
    tables={
        'norms': Table(
            '',
            {
                'as in the recipe': with_own(PICO),
                'layer norm in the blocks': with_own(PICO, token_norm=False),
                'no norm before the classifier': with_own(PICO, head_norm=False),
                "neither, and timm's initial weights": with_own(
                    PICO, token_norm=False, head_norm=False, weight_init=''
                ),
            },
            'epochs',
            0.6,
            ('validation top-1', 'training, min'),
        )
    },
    flags=Settings(seeds=1, workers=1),
    record='norms_runs.json',
)


# ----------------------------------------------------------------------------------------- the same norms, photographs
def norms_of(projection: str) -> Changes:
    """A model with a projection as it is, and with each norm that Pathfinder needs."""
    changed = {'': {}, ', token_norm': {'token_norm': True}, ', head_norm': {'head_norm': True}}
    return {f'`{projection}`{name}': {'model_args': {'projection': projection, **own}} for name, own in changed.items()}


PHOTOGRAPH_NORMS = Study(
    question='Do the norms that Pathfinder needs gain on photographs? CIFAR-10 at 256 tokens, fixed and dynamic E.',
    recipe='cifar10_pixels_pico',
    page='choices.md',
    common={
        'model': 'linformer_vit_pico_patch2_32',
        'stages': ((32, 1.0),),
        'max_minutes': 0.0,
        'val_fraction': 0.1,
        'test': False,
    },
    tables={
        'photograph_norms': Table(
            '',
            norms_of('separable') | norms_of('dynamic'),
            'epochs',
            0.5,
            ('validation top-1', 'training, min'),
        ),
        'photograph_norms_longer': Table(
            '',
            {name: own for name, own in norms_of('separable').items() if 'head_norm' not in name},
            'epochs',
            2.0,
            ('validation top-1', 'training, min'),
        ),
    },
    flags=Settings(),
    record='photograph_norms_runs.json',
)

STUDIES = {'choices': CHOICES, 'patches': PATCHES, 'norms': NORMS, 'photograph_norms': PHOTOGRAPH_NORMS}
