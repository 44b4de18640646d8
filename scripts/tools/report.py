"""What a run is worth: its score beside softmax regression on the raw pixels, and a picture of what it attends to.

    python -m scripts.tools.report --run outputs/demo

Reads a finished run (`metrics.json`, `model/`) and the data that it was trained on; sets that timm opens (`wds/…` and
the like) are named by you, with --dataset, --data-dir and --dataset-args. Images in folders are shrunk to 16×16 for
softmax regression, whose penalty is chosen on a fifth of the training images. Writes into the same folder:
`report.json` (both scores), `predictions.png` (test images, what the model sees in them and what it attends to) and
`images/` (the images of the picture, for `linvision predict`).
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from linvision.analysis.attention_map import attention_maps
from linvision.analysis.figure_text import literal
from linvision.cli.pretrained import load_model
from linvision.data import Batches, ImageSet, create_batches, create_dataset, in_memory
from linvision.data.recorded import read_metrics, recorded_data
from linvision.guard import end, guarded
from linvision.train.checkpoint import check_same_images
from linvision.train.data import fingerprint
from scripts.tools.softmax_regression import softmax_regression

COLUMNS, ROWS, WRONG = 6, 4, 8  # the picture's grid, and how many of its images the model gets wrong
POOL = 1000  # the picture's images are drawn from so many: the run has scored the whole set already
SEED = 0
NEEDED = ('model', 'crop_mode', 'on_bad_image', 'num_samples', 'num_parameters', 'train_minutes', 'tokens')
_logger = logging.getLogger(__name__)
POSITIVE, NEGATIVE = (0.95, 0.15, 0.1), (0.15, 0.4, 1.0)  # red and blue


@torch.inference_mode()
def probabilities(model: nn.Module, batches: Batches) -> Tensor:
    """Probabilities of every image: (n, classes)."""
    size = model.pretrained_cfg['input_size'][-1]
    return torch.cat([model(images).softmax(-1) for images, _ in batches.ordered(size)])


def choose(right: Tensor) -> list[int]:
    """Positions of the images to show, drawn by a fixed seed: right ones, then `WRONG` wrong ones; each fills up for
    the other where there are too few."""
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(SEED))
    good, bad = order[right[order]], order[~right[order]]
    wrong = min(len(bad), max(WRONG, COLUMNS * ROWS - len(good)))
    return [*good[: COLUMNS * ROWS - wrong].tolist(), *bad[:wrong].tolist()]


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """Signed weights over images in grey, red above and blue below zero, the stronger the less transparent.

    Args:
        images: (n, H, W, 3) in 0..1.
        maps: (n, H, W), signed; each is scaled by its own largest magnitude.

    Returns:
        (n, H, W, 3) in 0..1.
    """
    scaled = maps / maps.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    colour = torch.where(scaled[..., None] > 0, torch.tensor(POSITIVE), torch.tensor(NEGATIVE))  # (n, H, W, 3)
    strength = 0.85 * scaled.abs()[..., None]
    return (1 - strength) * images.mean(-1, keepdim=True) + strength * colour


def draw(path: Path, images: Tensor, maps: Tensor, captions: list[tuple[str, bool]], title: str) -> None:
    """A grid of pairs: the image, and the same with the attention laid over it.

    Args:
        path: The PNG.
        images: (n, H, W, 3) in 0..1.
        maps: (n, H, W), signed.
        captions: For each image what stands above it, and whether the model is right.
        title: Title of the picture.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    gap = torch.ones(len(images), images.shape[1], 1, 3)
    pairs = torch.cat([images, gap, overlay(images, maps)], dim=2)  # (n, H, 2·W + 1, 3)
    figure = Figure(figsize=(16.5, 8.6), layout='constrained')
    figure.suptitle(literal(title), fontsize=15)
    axes = figure.subplots(ROWS, COLUMNS).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, pair, (words, right) in zip(axes, pairs, captions, strict=False):
        ax.imshow(pair.numpy(), interpolation='nearest')
        ax.set_title(literal(words), fontsize=11, color='#1a6e34' if right else '#b3261e')
    colours = LinearSegmentedColormap.from_list('signed', [NEGATIVE, (0.5, 0.5, 0.5), POSITIVE])
    bar = figure.colorbar(ScalarMappable(Normalize(-1, 1), colours), ax=axes, location='bottom', aspect=70, shrink=0.6)
    bar.set_label(
        "what the last block attends to: weight of each pixel, relative to its image's strongest "
        '(signed; stripes are rows of the projection E, much alike from image to image)',
        size=11,
    )
    figure.savefig(path, dpi=100)


def picture(run: Path, model: nn.Module, test_set: ImageSet, score: str) -> None:
    """Write `predictions.png` and the images in it.

    Args:
        run: The folder.
        model: The model.
        test_set: Images to draw from.
        score: The model's score in words, for the title.
    """
    config = resolve_model_data_config(model)
    batches = create_batches(test_set, 100, config['mean'], config['std'], torch.device('cpu'))
    scores = probabilities(model, batches)
    right = scores.argmax(1) == test_set.labels
    index = choose(right)
    captions = []
    for i in index:
        says, truth = test_set.classes[scores[i].argmax()], test_set.classes[test_set.labels[i]]
        words = f'{says} {100 * scores[i].max():.0f} %' + ('' if right[i] else f'\ntruth: {truth}')
        captions.append((words, bool(right[i])))
    size = model.pretrained_cfg['input_size'][-1]
    maps = attention_maps(model, batches.preparation.plain(batches.images[index], size))  # (n, h, w)
    images = (batches.images[index].float() / 255).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # (n, H, W, 3)
    maps = nn.functional.interpolate(maps[:, None], size=images.shape[1:3], mode='nearest')[:, 0]
    wrong = len(index) - int(right[index].sum())
    title = (
        f'{len(index) - wrong} test images that the model gets right (green) and {wrong} that it gets wrong (red), '
        f'drawn at random from the first {len(right):,}; {score}'
    )
    draw(run / 'predictions.png', images, maps, captions, title)
    save_images(run / 'images', test_set, index)


def save_images(folder: Path, images: ImageSet, index: list[int]) -> None:
    """Write images as PNG files named by position and class, and remove those of an earlier report."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob('[0-9][0-9][0-9][0-9][0-9]_*.png'):
        old.unlink()
    for i in index:
        name = images.classes[images.labels[i]].lower().replace('/', '-').replace(' ', '_')
        pixels = images.images[i].permute(1, 2, 0).squeeze(-1)  # (H, W) or (H, W, 3)
        Image.fromarray(pixels.numpy()).save(folder / f'{i:05d}_{name}.png')


def table(rows: dict[str, Any]) -> str:
    """The scores side by side."""
    lines = [f'{"":34}{"top-1":>9}{"parameters":>13}{"training":>11}']
    for name, row in rows.items():
        seconds = f'{row["train_seconds"]:,.0f} s'
        lines.append(f'{name:34}{100 * row["top1"]:>7.2f} %{row["num_parameters"]:>13,}{seconds:>11}')
    return '\n'.join(lines)


def report(
    run: Path, dataset: str = '', data_dir: Path | None = None, dataset_args: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Score both models, write `report.json`, `predictions.png` and `images/`.

    Args:
        run: Output folder of a finished run.
        dataset, data_dir, dataset_args: Its data, where the run's folder does not decide (`recorded_data`).

    Returns:
        The contents of `report.json`: a row for each of the two.

    Raises:
        FileNotFoundError: The folder holds no finished run.
        ValueError: The run was not scored, is of no classifier, asks for data that the user must name, or its images
            have changed since.
    """
    if not (run / 'metrics.json').is_file():
        raise FileNotFoundError(f'{run} holds no finished run: metrics.json is missing. Train first.')
    metrics = read_metrics(run / 'metrics.json')
    recipe = metrics['recipe']
    if recipe.get('task', 'classify') != 'classify':
        raise ValueError(f'The run in {run} learnt {recipe["task"]}, no classes: a report is of a classifier.')
    if recipe.get('native_sizes'):
        raise ValueError(f'The run in {run} keeps the shape of its images: a report is of images of one size.')
    if 'top1' not in metrics:
        raise ValueError(f'The run in {run} was not scored on the test set. Give its command again without --no-test.')
    dataset, data_dir, arguments = recorded_data(run, metrics, dataset, data_dir, dataset_args)
    if lacking := [name for name in NEEDED if name not in {**metrics, **recipe}]:
        raise ValueError(f'{run}/metrics.json is none that a run wrote: it lacks {lacking[0]}.')
    model = load_model(run / 'model')
    train_set = create_dataset(dataset, data_dir, 'train', **arguments)
    check_same_images(run, fingerprint(train_set), metrics.get('images', {}))
    found, known = create_dataset(dataset, data_dir, 'test', **arguments), metrics['num_samples']
    if len(found) != known + metrics.get('num_left_out', 0):
        raise ValueError(f'{data_dir} has {len(found):,} test images, and {known:,} when {run} was scored.')
    reading = {'crop_mode': recipe['crop_mode'], 'on_bad_image': recipe['on_bad_image']}
    test_set = in_memory(found, model.patch_embed.img_size[0], **reading)
    files = dataset == 'image_folder'
    baseline, shrink = ('16×16 pixels', {'img_size': 16, 'l2': 'auto'}) if files else ('raw pixels', {})
    reading |= {'dataset_args': arguments, **shrink}
    rows = {
        recipe['model']: {
            'top1': metrics['top1'],
            'num_samples': metrics['num_samples'],
            'num_parameters': metrics['num_parameters'],
            'train_seconds': 60 * metrics['train_minutes'],
            'tokens': metrics['tokens'],
        },
        f'softmax regression, {baseline}': softmax_regression(dataset, data_dir, **reading),
    }
    (run / 'report.json').write_text(json.dumps(rows, indent=2) + '\n')
    score = f'it is right on {100 * metrics["top1"]:.2f} % of all {metrics["num_samples"]:,}'
    try:
        picture(run, model, test_set.subset(torch.arange(min(POOL, len(test_set)))), score)
    except Exception as error:  # whatever it is, the report is there
        _logger.warning(f'no picture ({type(error).__name__}: {error}); {run}/report.json is written all the same')
    return rows


def main(
    run: Path = Path('outputs/demo'),
    dataset: str = '',
    data_dir: Path | None = None,
    dataset_args: dict[str, int | float | bool | str] | None = None,
) -> None:
    """Compare a finished run with softmax regression, and show what it attends to.

    Args:
        run: Output folder of the run.
        dataset: Name of the data set; by default the run's own.
        data_dir: Folder that holds the data; by default the run's own.
        dataset_args: Arguments of the data set, as in the recipe; by default the run's own.
    """
    try:
        rows = report(run, dataset, data_dir, dataset_args)
    except (ValueError, OSError) as error:
        end(f'{error}')
    print(table(rows))


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
