"""A plain ViT as a Linformer ViT: convert it, fit E to images, and report how near the two are.

    linvision convert vit_tiny_patch16_224 --img-size 512 --proj-len 256 --data-dir MY_IMAGES
    linvision convert outputs/my_vit --dataset fashion_mnist --proj-len 64 --output-dir outputs/converted

The first argument is a timm name with pretrained weights, `hf-hub:…`, or the folder of a model (a run's output folder
too). Fitting takes training images of the set, without labels; agreement is that on its test images. Writes
`config.json` and `model.safetensors`, which `timm.create_model('local-dir:FOLDER', pretrained=True)`, `linvision
predict` and `evaluate` and a recipe's `--init` read, and `conversion.json` with what is printed.
"""

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import tyro
from timm.models import save_for_hf

from linvision.cli.images import ImagesOf
from linvision.cli.pretrained import load_vit
from linvision.convert import agreement, fit_projection, from_vit
from linvision.meter import counted
from linvision.train.parallel import choose_device


def lines(report: dict[str, Any], folder: Path) -> list[str]:
    """What a person reads of the report."""
    lengths = report['proj_len'] if isinstance(report['proj_len'], int) else list(report['proj_len'])
    found = [f'{report["original"]}: {report["tokens"]:,} tokens, projection {report["projection"]}, K = {lengths}']
    for made in ('pooled', 'fitted'):
        if made in report:
            own, of = report[made], f'of {report[made]["num_samples"]:,} test images'
            same = f'; the same class for {100 * own["same_top1"]:.1f} % {of}' if 'same_top1' in own else f' {of}'
            found.append(f'E {made}: outputs differ by {100 * own["relative_error"]:.1f} %{same}')
    return [*found, f'{folder}: for linvision evaluate, predict, train finetune --init, and local-dir: in timm']


def main(
    model: tyro.conf.Positional[str],
    output_dir: Path = Path('outputs/converted'),
    checkpoint: str = '',
    img_size: int = 0,
    proj_len: int | tuple[int, ...] = 64,
    projection: str = 'linear',
    sharing: str = 'layerwise',
    steps: int = 200,
    lr: float = 3e-3,
    dataset: str = 'image_folder',
    data_dir: Path = Path('data'),
    batch_size: int = 32,
    limit: int = 1000,
    on_bad_image: Literal['stop', 'skip'] = 'stop',
    device: str = 'auto',
) -> None:
    """Convert a model.

    Args:
        model: A timm name with pretrained weights, `hf-hub:…`, or a folder with a model.
        output_dir: Folder for the converted model.
        checkpoint: File with the weights, for a timm name.
        img_size: Image size, 0 for the model's own.
        proj_len: K, the number of projected rows; or one for each layer, where each has an E (`--sharing key_value`).
        projection: 'linear', 'separable', 'conv', 'mean_pool', 'max_pool', 'dynamic' or 'none'.
        sharing: 'layerwise', 'key_value', 'headwise' or 'none'.
        steps: Steps of fitting E, a batch each; 0 leaves it as pooling by area.
        lr: Learning rate of fitting.
        dataset: Name of the data set.
        data_dir: Folder that holds the data.
        batch_size: Images in a batch.
        limit: Test images to compare on, 0 for all.
        on_bad_image: What becomes of an image that cannot be read: it stops the conversion, or is left out.
        device: Torch device; 'auto' takes the accelerator if there is one.
    """
    where = choose_device(device)
    original = load_vit(model, checkpoint, img_size).to(where)
    converted = from_vit(original, proj_len, projection, sharing)
    images = ImagesOf(original, dataset, data_dir, batch_size, where, on_bad_image)
    report = {
        'original': model,
        'proj_len': proj_len,
        'tokens': original.patch_embed.num_patches,
        'projection': projection,
        'sharing': sharing,
        'pooled': agreement(converted, original, images.test(limit)),
    }
    errors: list[float] = []
    if steps and projection not in ('none', 'mean_pool', 'max_pool'):
        pooling = deepcopy(converted)
        errors = fit_projection(converted, original, counted(images.training(), 'fitting', steps, 'steps'), steps, lr)
    save_for_hf(converted, str(output_dir), safe_serialization=True)  # now: a test image may fail
    if errors:
        report['fitted'] = agreement(converted, original, images.test(limit))
        if report['fitted']['relative_error'] > report['pooled']['relative_error']:
            save_for_hf(pooling, str(output_dir), safe_serialization=True)
            logging.warning(
                'the fitted E is further from the original than pooling, which is saved: try more steps, or another lr.'
            )
        report['attention_error'] = {'first': errors[0], 'last': errors[-1], 'steps': steps}
    (output_dir / 'conversion.json').write_text(json.dumps(report, indent=2) + '\n')
    print('\n'.join(lines(report, output_dir)))
