"""Score a trained model on a data set, at its own image size or another.

    linvision evaluate outputs/demo
    linvision evaluate outputs/demo --img-size 64
    linvision evaluate outputs/mine --dataset image_folder --data-dir OTHER_IMAGES --split all
    linvision evaluate linformer_vit_pico_patch1_32.cifar10

The first gives the very score that the run reported, on its own test set. Another size resizes the model
(`set_input_size`), without training, and the images (bicubic where they grow). A folder of other images may hold only
some of the model's classes. Sets that timm opens (`wds/…` and the like) are named by you and not by the model's folder,
with --dataset, --data-dir and --dataset-args.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from timm.data import resolve_model_data_config

from linvision.cli.pretrained import load_model
from linvision.data import Images, ImageSet, create_batches, create_dataset, part
from linvision.data.folders import ImageFiles, split_folders
from linvision.data.native_sizes import NativeSizes
from linvision.data.recorded import read_metrics, recorded_data
from linvision.nearest import nearest
from linvision.rules import at_least, check
from linvision.train.data import fingerprint
from linvision.train.evaluate import evaluate, score_words
from linvision.train.model import count_tokens, set_size, side_of
from linvision.train.parallel import choose_device
from linvision.train.precision import DTYPES
from linvision.train.pretrained import model_folder, registered
from linvision.train.recipe import RULES


def folder_of(name: str) -> Path | None:
    """The folder of a model, where there is one: that of a run or of a model, or of weights that are registered.

    A file that the model's own config names says nothing of its data: the config may be a stranger's.
    """
    folder = Path(name.removeprefix('local-dir:'))
    if folder.is_dir():
        return model_folder(folder)
    cfg = registered(name)
    return Path(cfg.file).parent if cfg is not None and cfg.file else None


def data_of(folder: Path) -> dict[str, Any]:
    """`metrics.json` of the run that trained a model, where there is one."""
    for metrics in (folder / 'metrics.json', folder.parent / 'metrics.json'):  # of the package's weights; of a run
        if metrics.is_file():
            try:
                return read_metrics(metrics)
            except ValueError as error:
                raise ValueError(
                    f'{error} Move it away and name the data, with --dataset and --data-dir; or give the command that '
                    'trained again, which scores and writes it anew.'
                ) from error
    return {}


def check_unseen(data_dir: Path, dataset: str, metrics: dict[str, Any]) -> None:
    """Raise ValueError where the folder that a run split has other images now: some may have changed sides."""
    if dataset != 'image_folder' or 'images' not in metrics or split_folders(data_dir)[1] is not None:
        return
    if fingerprint(create_dataset(dataset, data_dir, 'train')) != metrics['images']:
        raise ValueError(
            f'{data_dir} has other images than when the model was trained, and no val/ of its own: every fifth is the '
            'test, and some that the model has learnt may be among them now. Score it on images that it has not seen, '
            'with --data-dir and --split all.'
        )


def with_classes_of(model: Any, images: Images) -> Images:
    """The images, with labels that mean what the model learnt.

    Raises:
        ValueError: They have other classes, or other channels.
    """
    if images.in_chans != model.in_chans:
        raise ValueError(
            f'The model takes {model.in_chans} channels, but the images of the set have {images.in_chans}.'
        )
    learnt = tuple(model.pretrained_cfg.get('label_names') or ())
    if not learnt and model.num_classes != len(images.classes):
        raise ValueError(
            f'The model tells {model.num_classes} classes apart, the set has {len(images.classes)}: '
            f'{list(images.classes)[:20]}. Score it on the data that it was trained on.'
        )
    learnt = learnt or images.classes
    if learnt == images.classes:
        return images
    if isinstance(images, ImageFiles) and set(images.classes) <= set(learnt):
        return images.labelled(learnt)
    raise ValueError(
        f'The set has the classes {list(images.classes)[:20]}, but the model learnt {list(learnt)[:20]}: labels would '
        'mean something else. Score it on folders with the names that it learnt.'
    )


def main(
    model: tyro.conf.Positional[str],
    dataset: str = '',
    data_dir: Path | None = None,
    split: str = 'test',
    img_size: int = 0,
    limit: int = 0,
    batch_size: int = 100,
    device: str = 'auto',
    precision: str = 'fp32',
    workers: int = 0,
    on_bad_image: Literal['stop', 'skip'] = 'stop',
    dataset_args: dict[str, int | float | bool | str] | None = None,
    as_json: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name='json')] = False,
) -> None:
    """Score a model.

    Args:
        model: Output folder of a run, folder with `config.json` and `model.safetensors`, `hf-hub:OWNER/MODEL`, or a
            name with weights.
        dataset: Name of the data set; by default the run's own.
        data_dir: Folder that holds the data; by default the run's own with its data set, `data` with another.
        split: 'train', 'test' (of a folder without `val/`, every fifth image of a class), or 'all' images of a folder.
        img_size: Image size, 0 for the model's own.
        limit: Score so many images, 0 for all: the first, or some evenly over a folder.
        batch_size: Images in a step.
        device: Torch device; 'auto' takes the accelerator if there is one.
        precision: 'fp32', 'bf16' or 'fp16'.
        workers: Processes that read images.
        on_bad_image: What becomes of an image that cannot be read: an error that names it, or it is left out.
        dataset_args: Arguments of the data set, as in the recipe.
        as_json: Print one line of JSON.
    """
    given = {'img_size': img_size, 'limit': limit, 'batch_size': batch_size, 'workers': workers}
    check(given, {**RULES, 'limit': at_least(0)})
    if precision not in DTYPES:
        raise ValueError(nearest('precision', precision, DTYPES))
    where = choose_device(device)
    net = load_model(model).to(where)
    config = resolve_model_data_config(net)
    folder = folder_of(model)
    metrics = data_of(folder) if folder else {}
    dataset, data_dir, arguments = recorded_data(folder or Path(model), metrics, dataset, data_dir, dataset_args)
    try:
        images = create_dataset(dataset, data_dir, split, **arguments)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error} (Looked for from {Path.cwd()}; --data-dir names another folder.)') from error
    own = Path((metrics.get('recipe') or {}).get('data_dir', ''))
    if data_dir.resolve() == own.resolve() and split not in ('train', 'all'):
        check_unseen(data_dir, dataset, metrics)
    images = with_classes_of(net, images)
    images = part(images, limit)
    size = img_size or side_of(net)
    set_size(net, size)
    cropping = {'crop_pct': config['crop_pct'], 'crop_mode': config['crop_mode']}
    native = NativeSizes.read_by(net) if isinstance(images, ImageFiles) else None  # else they have one size
    reading = {'workers': workers, 'on_bad_image': on_bad_image, 'native': native, **cropping}
    batches = create_batches(images, batch_size, config['mean'], config['std'], where, **reading)
    scores = evaluate(net, batches, size, precision)
    data = {'dataset': dataset, 'data_dir': str(data_dir), 'split': split}
    if isinstance(images, ImageSet) and images.note:
        data['data_note'] = images.note
    tokens = count_tokens(net)
    if as_json:
        print(json.dumps({'model': model, **data, 'img_size': size, 'tokens': tokens, **scores}))
        return
    note = f' ({data["data_note"]})' if 'data_note' in data else ''
    shape = 'in their own shape, at most' if native else f'at {size}×{size},'
    print(f'{split} images of {dataset}{note} {shape} {tokens:,} tokens: {score_words(scores)}')
