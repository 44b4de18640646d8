"""Weights to start from, and teachers: in a folder that a run exported, on a hub, or among timm's own."""

import difflib
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from linvision.data.native_sizes import CROP_MODE
from linvision.models.checks import SIZE
from linvision.models.resize import checkpoint_filter_fn
from linvision.nearest import nearest
from linvision.rules import POSITIVE, SIDE, check
from linvision.train.checkpoint import as_dict, first_line

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random')
# what timm, json, torch and safetensors raise for a damaged or strange file; all else is a fault of ours
REFUSALS = (ValueError, TypeError, OSError, RuntimeError, ImportError, pickle.UnpicklingError, SafetensorError)
CROP_MODES = ('center', 'border', 'squash', CROP_MODE)


def is_source(name: str) -> bool:
    """Whether it can hold weights: a folder, `hf-hub:…` and the like, or a name of timm's."""
    return Path(name).is_dir() or ':' in name or timm.is_model(name)


def registered(name: str) -> PretrainedCfg | None:
    """What timm has registered of a name's weights; None for a folder or a hub's name."""
    return timm.get_pretrained_cfg(name) if timm.is_model(name) else None


def tagged(name: str) -> str:
    """A name of timm's with the tag that timm chooses where none is said; a folder or a hub's name as it is."""
    cfg = registered(name)
    return f'{cfg.architecture}.{cfg.tag}' if cfg is not None and cfg.tag else name


def check_source(name: str) -> None:
    """Raise ValueError for what can hold no weights."""
    if not is_source(name):
        raise ValueError(
            f"No weights to start from in {name!r}: it is neither a folder nor a name of timm's. If it is a run's "
            "folder, that run comes first; --init '' starts from scratch."
        )


def check_weights_file(path: str) -> None:
    """Raise FileNotFoundError where a file with weights is named that is not there: timm's own error has no words."""
    if path and not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist: a file with weights was expected.')


def source_of(name: str) -> str:
    """timm's name of a model: a folder that a run exported, or itself."""
    return f'local-dir:{model_folder(Path(name))}' if Path(name).is_dir() else name


def model_folder(folder: Path) -> Path:
    """The folder with the weights: itself, or `model/` of a run's output folder.

    Raises:
        FileNotFoundError: It lacks `config.json`, or `model.safetensors` and what timm writes in its place.
    """
    if not folder.is_dir():
        what = 'is a file' if folder.is_file() else 'does not exist'
        near = difflib.get_close_matches(folder.name, [path.name for path in folder.parent.glob('*/')])
        raise FileNotFoundError(
            f"{folder} {what}: a model's folder, or the name of a model with weights, was expected."
            + f' Near it: {", ".join(near)}.' * bool(near)
        )
    inner = folder / 'model'
    folder = inner if not (folder / 'config.json').is_file() and inner.is_dir() else folder
    for name, other in (('config.json', ''), ('model.safetensors', 'pytorch_model.bin')):
        if not any((folder / file).is_file() for file in (name, other)):
            raise FileNotFoundError(
                f'{folder} holds no model: {name} is missing. A run leaves one in OUTPUT_DIR/model at its end, and '
                'goes on by the same command.'
            )
    return folder


def check_folder(folder: Path) -> None:
    """Raise where a folder holds no whole model, without reading its weights.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A file is damaged; the message names it.
    """
    folder = model_folder(folder)
    config, weights = folder / 'config.json', folder / 'model.safetensors'
    try:
        found = json.loads(config.read_text())
        if not isinstance(found, dict) or not isinstance(found.get('architecture'), str):
            raise ValueError('it names no architecture')
        for part in ('pretrained_cfg', 'model_args'):
            if not isinstance(found.get(part, {}), dict):
                raise ValueError(f'{part} must be names with their values, got {found[part]!r:.80}')
        given = {name: value for name, value in found.get('model_args', {}).items() if value is not None}
        check(given, {'img_size': SIZE, 'in_chans': POSITIVE})  # by which timm changes what it says of images
        check_reading(as_dict(found.get('pretrained_cfg', found)))  # timm mends some of it, but others read it too
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{config} is damaged ({first_line(error)}).') from error
    try:
        if weights.is_file():
            with safe_open(weights, 'pt'):  # looks at the header and the length
                pass
    except SafetensorError as error:
        raise ValueError(f'{weights} is damaged ({first_line(error)}).') from error


def load_source(name: str, what: str, weights: bool = True, **arguments: Any) -> Any:
    """timm's model of a source: the one way to load what may come from a stranger, in whatever state.

    Args:
        name: As for `source_of`.
        what: The beginning of an error.
        weights: Load them too.
        arguments: Of `timm.create_model`.

    Raises:
        FileNotFoundError: A folder lacks the files of a model.
        ValueError: The model cannot be made of what is there, or would not know how to read images.
    """
    source = source_of(name)
    try:
        if source.startswith('local-dir:'):
            check_folder(Path(source.removeprefix('local-dir:')))
        model: Any = timm.create_model(source, pretrained=weights, **arguments)
        config = model.pretrained_cfg
        check_reading(config)
        check_names(config.get('label_names'), model.num_classes)
        if 'in_chans' not in arguments:
            check_channels(config, getattr(model, 'in_chans', 3))
    except Exception as error:
        looked_at = source.startswith('local-dir:') or timm.is_model(source)  # on a hub timm is the first to look
        if looked_at and not isinstance(error, REFUSALS):
            raise
        raise ValueError(f'{what}: {reason_of(error)}') from error
    return model


def reason_of(error: Exception) -> str:
    """A line for what timm, torch and others say in many, some of which advise to load a pickle all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
    line = next((line for line in lines if 'GLOBAL' in line), lines[0])
    if line.endswith(':') and len(lines) > 1:
        line += f' {lines[1]}'
    line = ' '.join(each for each in re.split(r'(?<=\.) ', line) if 'weights_only=False' not in each)
    known = isinstance(error, ValueError | OSError | RuntimeError) and line
    return line[:300] if known else f'{type(error).__name__}: {line[:300]}'


def check_reading(config: dict[str, Any]) -> None:
    """Raise ValueError where a model's config does not say how images are read."""
    size, crop = config.get('input_size'), config.get('crop_pct')
    if size is not None and not (are_numbers(size, 3) and all(isinstance(n, int) and 0 < n <= SIDE for n in size)):
        raise ValueError(f'input_size must be three whole numbers, channels, height and width, got {size!r:.80}.')
    if crop is not None and not (are_numbers([crop], 1) and 0.1 <= crop <= min((size or (3, 224, 224))[1:])):
        raise ValueError(f'crop_pct must be a number, 0.1 at least and at most the image size, got {crop!r:.80}.')
    for name, words in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES)):
        if (value := config.get(name)) is not None and value not in words:
            raise ValueError(nearest(name, str(value)[:80], words))
    for name in ('mean', 'std'):
        value = config.get(name)
        if value is not None and not (are_numbers(value) and (name == 'mean' or min(value) > 0)):
            above = ', above 0,' if name == 'std' else ''
            raise ValueError(f'{name} must be a list of numbers{above} one for each channel, got {value!r:.80}.')


def are_numbers(values: Any, count: int = 0) -> bool:
    """Whether it is a list of finite numbers (0: of one at least)."""
    if not isinstance(values, list | tuple) or not values or count not in (0, len(values)):
        return False
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in values)


def check_names(names: Any, num_classes: int) -> None:
    """Raise ValueError where the names of the classes are no names, or not as many as the classes."""
    if names is None or not num_classes:  # a backbone may keep the names of what it was trained on
        return
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'label_names must be a list of names, got {names!r:.80}.')
    if len(names) not in (0, num_classes):
        raise ValueError(f'label_names must be one for each of {num_classes} classes, got {len(names)}.')


def check_channels(config: dict[str, Any], in_chans: int) -> None:
    """Raise ValueError where mean and deviation are of other channels than the model's."""
    for name in ('mean', 'std'):
        if (value := config.get(name)) is not None and len(value) != in_chans:
            raise ValueError(f'{name} must be one number for each of {in_chans} channels, got {list(value)!r:.80}.')


def load_backbone(model: VisionTransformer, name: str, classes: tuple[str, ...] = ()) -> bool:
    """Give a model the weights of another; sizes and K are changed as in any checkpoint.

    Args:
        model: The model.
        name: A folder with `config.json` and `model.safetensors`, a run's output folder, `hf-hub:…`, or a name of
            timm's with pretrained weights.
        classes: What the model is to tell apart: the other's head comes too where it tells apart the same.

    Returns:
        Whether the head came too.

    Raises:
        ValueError: The other is of another kind or width.
    """
    check_source(name)
    in_chans = model.patch_embed.proj.in_channels
    other = load_source(name, f'No weights to start from in {name!r}', in_chans=in_chans)
    kind = {'embed_dim': None, 'has_class_token': None, 'num_reg_tokens': None, 'token_norm': False}
    theirs, ours = ({k: getattr(m, k, default) for k, default in kind.items()} for m in (other, model))
    if theirs != ours:
        raise ValueError(
            f"The weights of {name} do not fit: it has {theirs}, the recipe's model {ours}. Choose a model of the same "
            'width and kind with --model and --model-args.'
        )
    try:
        state = checkpoint_filter_fn(other.state_dict(), model)
        head = ('head.', 'head_norm.')
        heads = [{k for k in m.state_dict() if k.startswith(head)} for m in (other, model)]
        names = tuple(other.pretrained_cfg.get('label_names') or ())
        same = bool(classes) and names == tuple(classes) and heads[0] == heads[1]
        state = {k: v for k, v in state.items() if same or not k.startswith(head)}
        result = model.load_state_dict(state, strict=False)
        missing = [k for k in result.missing_keys if not k.startswith(head)]
        wrong = f'lacks {missing[:3]}' if missing else f'has {result.unexpected_keys[:3]} besides'
        fits = not missing and not result.unexpected_keys
    except (RuntimeError, ValueError) as error:
        fits, wrong = False, f'says: {" ".join(str(error).split()[:40])}'
    if not fits:
        raise ValueError(
            f'The weights of {name} do not fit {type(model).__name__} of width {model.embed_dim}: it {wrong}.'
        )
    return same


def load_teacher(
    name: str, student: VisionTransformer, img_size: int, device: torch.device, classes: tuple[str, ...] = ()
) -> nn.Module:
    """A trained model that the student learns from: a folder that a run exported, or a name of timm's.

    Args:
        name: The folder or the name.
        student: The model that learns.
        img_size: Image size of both.
        device: Where the teacher goes.
        classes: What the student tells apart.

    Raises:
        ValueError: The teacher tells other things apart, or cannot be loaded.
    """
    in_chans = student.patch_embed.proj.in_channels
    wanted = {'img_size': img_size, 'in_chans': in_chans}
    teacher = load_source(name, f'No teacher can be loaded from {name!r}', **wanted)
    known = tuple(teacher.pretrained_cfg.get('label_names') or classes)
    renamed = bool(classes) and known != tuple(classes)
    if renamed or teacher.num_classes != student.num_classes:
        words = f': {list(known[:5])}, not {list(classes[:5])}' if renamed else ''
        raise ValueError(
            f'The teacher {name} tells {teacher.num_classes} classes apart, the student {student.num_classes}{words}. '
            'Fine-tune the teacher on these images first: linvision train finetune --init … --dataset ….'
        )
    return teacher.to(device).eval().requires_grad_(False)
