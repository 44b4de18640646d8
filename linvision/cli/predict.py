"""Classify images with a model that a run exported.

    linvision predict outputs/demo IMAGE_OR_FOLDER... [--topk 5] [--json] [--on-bad-image skip]
    linvision predict linformer_vit_pico_patch1_32.cifar10 MY_IMAGES --picture outputs/predictions.png

Images are read as the model's `config.json` says: channels, size, border, mean and standard deviation; in their own
shape where it was trained so.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from timm.data import resolve_model_data_config
from torchvision.transforms import v2

from linvision.analysis.figure_text import literal
from linvision.cli.images import caption, class_names, find_images
from linvision.cli.pretrained import load_model
from linvision.data import Augmentation
from linvision.data.image_file import read_image
from linvision.data.native_sizes import NativeSizes, NativeTransform
from linvision.data.timm_transform import changed, timm_transform
from linvision.models.mixed_sizes import collate
from linvision.train.pretrained import tagged

PICTURES = ('.png', '.jpg', '.pdf', '.svg')
LARGEST = 60  # images in a picture

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict(
    model: Any, paths: Sequence[Path], topk: int = 5, batch_size: int = 32, on_bad_image: str = 'stop'
) -> list[dict[str, Any]]:
    """The likeliest classes of each image.

    Args:
        model: The model, in eval mode.
        paths: Image files.
        topk: Classes for each image; at most all are given.
        batch_size: Images that go through the model together.
        on_bad_image: 'stop' or 'skip' what cannot be read; what is skipped is logged.

    Returns:
        For each image `{'image': path, 'classes': [{'name': ..., 'label': ..., 'probability': ...}, ...]}`.
    """
    config, native = resolve_model_data_config(model), NativeSizes.read_by(model)
    if native is None:
        transform: Any = timm_transform(**config)
    else:
        transform = v2.Compose(
            [
                NativeTransform(native, Augmentation(), config['mean']),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config['mean'], config['std']),
            ]
        )
    names = class_names(model)
    results = []
    for start in range(0, len(paths), batch_size):
        read = []
        for path in paths[start : start + batch_size]:
            try:
                read.append((path, changed(transform, read_image(path, model.in_chans), path)))  # (C, height, width)
            except OSError as error:
                if on_bad_image == 'stop':
                    raise OSError(f'{error} --on-bad-image skip leaves such images out.') from error
                _logger.warning(f'left out: {error}')
        if not read:
            continue
        images = [image for _, image in read]  # (C, height, width) each
        batch: Any = torch.stack(images) if native is None else collate([(x, 0) for x in images], native.patch_size)[0]
        probabilities, labels = model(batch).softmax(-1).topk(min(topk, model.num_classes))  # (B, topk) each
        for (path, _), row, columns in zip(read, probabilities.tolist(), labels.tolist(), strict=True):
            classes = [{'name': names[i], 'label': i, 'probability': p} for p, i in zip(row, columns, strict=True)]
            results.append({'image': str(path), 'classes': classes})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Predictions as text: a line for each image, the likeliest class first."""
    cells = [[r['image'], *(f'{c["name"]} {100 * c["probability"]:.1f} %' for c in r['classes'])] for r in results]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return '\n'.join('  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def picture(results: Sequence[dict[str, Any]], in_chans: int) -> Any:
    """A figure: the first images, each with its likeliest class below its name."""
    from matplotlib.figure import Figure

    shown = results[:LARGEST]
    columns = min(len(shown), 6)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(1.8 * columns, 3.6), 2.1 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis('off')
    for axis, result in zip(axes, shown, strict=False):
        image, best = read_image(Path(result['image']), in_chans), result['classes'][0]
        image.thumbnail((256, 256))
        axis.imshow(image, cmap='gray', vmin=0, vmax=255)
        words = caption(Path(result['image']), best['name'], best['probability'])
        axis.set_title(literal(words), fontsize=8)
    return figure


def main(
    model: tyro.conf.Positional[str],
    images: tyro.conf.Positional[tuple[Path, ...]],
    topk: int = 5,
    on_bad_image: Literal['stop', 'skip'] = 'stop',
    picture_file: Annotated[Path | None, tyro.conf.arg(name='picture')] = None,
    as_json: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name='json')] = False,
) -> None:
    """Print the likeliest classes of each image.

    Args:
        model: Output folder of a run, folder with `config.json` and `model.safetensors`, `hf-hub:OWNER/MODEL`, or a
            name with weights.
        images: Image files, and folders of images.
        topk: Classes to print for each image.
        on_bad_image: What becomes of an image that cannot be read: an error that names it, or it is left out.
        picture_file: File for a picture of the images, the first 60 at most, with their likeliest classes.
        as_json: Print JSON, not a table.
    """
    if topk < 1:
        raise ValueError(f'topk must be at least 1, got {topk}.')
    if not images:
        raise ValueError(f'Expected at least one image or folder after the model {model}.')
    if picture_file is not None and picture_file.suffix not in PICTURES:
        raise ValueError(f'The name of the picture must end in {", ".join(PICTURES)}, got {picture_file.name!r}.')
    net = load_model(model)
    if (found := tagged(model)) != model:
        _logger.warning(f'{model} has weights of {net.pretrained_cfg["tag"]} by default: {found}')
    results = predict(net, find_images(images), topk, on_bad_image=on_bad_image)
    if not results:
        raise OSError('None of the images could be read.')
    print(json.dumps(results, indent=2) if as_json else table(results))
    if picture_file is not None:
        picture_file.parent.mkdir(parents=True, exist_ok=True)
        picture(results, net.in_chans).savefig(picture_file, dpi=110)
