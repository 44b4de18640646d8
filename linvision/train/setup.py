"""What a run needs before its first step: a validation slice, a model, weights to start from, a teacher."""

from pathlib import Path

import timm
import torch
from timm.models import get_model_args
from torch import nn

from linvision.data import Images
from linvision.models.local_conv import LocalPath
from linvision.models.resize import checkpoint_filter_fn
from linvision.nearest import nearest
from linvision.train import masked_pixels
from linvision.train.checkpoint import first_line
from linvision.train.recipe import Recipe


def split_validation(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """The set without a random slice, and the slice; which images are in it depends on the seed alone."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n = round(len(images) * fraction)
    return images.subset(order[n:].sort().values), images.subset(order[:n].sort().values)


def create_model(recipe: Recipe, shape: dict[str, int], img_size: int) -> nn.Module:
    """The recipe's model.

    Args:
        recipe: The recipe.
        shape: What the images ask for: `in_chans` and `num_classes`.
        img_size: Image size.
    """
    arguments = {**shape, 'img_size': img_size, **recipe.model_args}
    if recipe.chunk_size != 'auto':
        arguments['chunk_size'] = recipe.chunk_size
    try:
        model = timm.create_model(recipe.model, **arguments)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        names = ('linformer_vit_*', 'vit_*', 'deit_*')
        raise ValueError(
            f'{recipe.model} cannot be trained by a recipe: its image size cannot be set. Models that can: '
            f'{", ".join(names)}, and others that take img_size.'
        ) from error
    if recipe.task == 'masked_pixels':
        masked_pixels.adapt(model)
    return model


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with all that the weights it starts from decide.

    A recipe that names no model takes theirs, and their image size. The span of local convolutions is theirs in any
    case, unless the recipe says otherwise: a kernel that spans less of the image than it was trained for means
    something else.

    Raises:
        ValueError: It names neither model nor weights.
    """
    if not recipe.init:
        if not recipe.model:
            raise ValueError('The recipe names no model: say --init, for that of the weights there, or --model.')
        return recipe
    check_source(recipe.init)
    try:
        with torch.device('meta'):
            source = timm.create_model(source_of(recipe.init), pretrained=False)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f'No model in {recipe.init!r}: {first_line(error)}') from error
    if recipe.model:
        grid = next((module.grid for module in source.modules() if isinstance(module, LocalPath)), None)
        if grid is None or not timm.models.is_model_in_modules(recipe.model, ['registry']):
            return recipe
        return recipe.replace(model_args={'local_grid': grid} | recipe.model_args)
    kept = {k: v for k, v in get_model_args(source).items() if k not in ('img_size', 'in_chans', 'num_classes')}
    size = recipe.img_size if recipe.img_size or recipe.stages else source.patch_embed.img_size[0]
    name = source.pretrained_cfg['architecture']
    return recipe.replace(model=name, model_args=kept | recipe.model_args, img_size=size)


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


def freeze(model: nn.Module, blocks: int) -> None:
    """Let the first blocks, and all that stands before them, not learn; -1 leaves nothing but the head.

    Raises:
        ValueError: There are not so many blocks.
    """
    if blocks > len(model.blocks):
        raise ValueError(f'freeze must be at most the {len(model.blocks)} blocks that there are, got {blocks}.')
    if not blocks:
        return
    model.requires_grad_(False)
    learning = [model.get_classifier()]
    if blocks > 0:
        after = ('norm', 'fc_norm', 'attn_pool')
        learning += [*model.blocks[blocks:], *(m for m in (getattr(model, name, None) for name in after) if m)]
    for module in learning:
        module.requires_grad_(True)


def load_backbone(model: nn.Module, name: str, classes: tuple[str, ...] = ()) -> None:
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
        other = timm.create_model(source_of(name), pretrained=True, in_chans=model.patch_embed.proj.in_channels)
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


def load_teacher(
    name: str, student: nn.Module, img_size: int, device: torch.device, classes: tuple[str, ...] = ()
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
        teacher = timm.create_model(source_of(name), pretrained=True, img_size=img_size, in_chans=in_chans)
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


def set_size(model: nn.Module, img_size: int) -> None:
    """Give the model another image size, unless it has it."""
    if tuple(model.patch_embed.img_size) == (img_size, img_size):
        return
    if not hasattr(model, 'set_input_size'):
        raise ValueError(nearest('way to change the image size of', type(model).__name__, ['linformer_vit_*', 'vit_*']))
    model.set_input_size(img_size=(img_size, img_size))


def has_idle_projection(model: nn.Module) -> bool:
    """Whether there is an E that no layer uses at the present size, since K is not below N."""
    if getattr(model, 'projection', None) is None:
        return False
    return all(block.attn.is_full(model.patch_embed.grid_size) for block in model.blocks)


def count_tokens(model: nn.Module) -> int:
    """Tokens of one image at the model's present size."""
    return model.patch_embed.num_patches
