"""Weights to start from, and teachers: in a folder that a run exported, on a hub, or among timm's own."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from linvision.models.resize import checkpoint_filter_fn
from linvision.train.checkpoint import first_line


def is_source(name: str) -> bool:
    """Whether it can hold weights: a folder, `hf-hub:…` and the like, or a name of timm's."""
    return Path(name).is_dir() or ':' in name or timm.is_model(name)


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
    inner = folder / 'model'
    folder = inner if not (folder / 'config.json').is_file() and inner.is_dir() else folder
    for name, other in (('config.json', ''), ('model.safetensors', 'pytorch_model.bin')):
        if not any((folder / file).is_file() for file in (name, other)):
            raise FileNotFoundError(
                f'{folder} holds no model: {name} is missing. A run leaves one in OUTPUT_DIR/model at its end, and '
                'goes on by the same command.'
            )
    return folder


def load_backbone(model: VisionTransformer, name: str, classes: tuple[str, ...] = ()) -> None:
    """Give a model the weights of another; sizes and K are changed as in any checkpoint.

    Args:
        model: The model.
        name: A folder with `config.json` and `model.safetensors`, a run's output folder, `hf-hub:…`, or a name of
            timm's with pretrained weights.
        classes: What the model is to tell apart: the other's head comes too where it tells apart the same.

    Raises:
        ValueError: The other is of another kind or width.
    """
    check_source(name)
    try:
        in_chans = model.patch_embed.proj.in_channels
        # Any: timm's factory sets pretrained_cfg, no class declares it
        other: Any = timm.create_model(source_of(name), pretrained=True, in_chans=in_chans)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f'No weights to start from in {name!r}: {first_line(error)}') from error
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
        same = classes and names == tuple(classes) and heads[0] == heads[1]
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
    try:
        teacher: Any = timm.create_model(source_of(name), pretrained=True, img_size=img_size, in_chans=in_chans)
    except RuntimeError as error:
        raise ValueError(f'No teacher can be loaded from {name!r}: {first_line(error)}') from error
    known = tuple(teacher.pretrained_cfg.get('label_names') or classes)
    renamed = bool(classes) and known != tuple(classes)
    if renamed or teacher.num_classes != student.num_classes:
        words = f': {list(known[:5])}, not {list(classes[:5])}' if renamed else ''
        raise ValueError(
            f'The teacher {name} tells {teacher.num_classes} classes apart, the student {student.num_classes}{words}. '
            'Fine-tune the teacher on these images first: python recipes/finetune.py --init … --dataset ….'
        )
    return teacher.to(device).eval().requires_grad_(False)
