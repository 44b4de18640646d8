"""The model of a recipe: made, given an image size, frozen; and what it asks of whoever trains it.

Its type, here and in all that trains it, is timm's `VisionTransformer`: `blocks`, `patch_embed`, `embed_dim` and others
are read by the names that they have there. Models of other classes that have these (EVA, for one) train too.
"""

import importlib.util
from typing import Any

import timm
import torch
from timm.models import get_model_args, is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.models.local_conv import LocalPath
from linvision.models.projection import Projection
from linvision.nearest import nearest
from linvision.train import masked_pixels
from linvision.train.pretrained import check_source, check_weights_file, load_source
from linvision.train.recipe import Recipe


def create_model(recipe: Recipe, shape: dict[str, int], img_size: int) -> VisionTransformer:
    """The recipe's model.

    Args:
        recipe: The recipe, as `resolved` gives it.
        shape: What the images ask for: `in_chans` and `num_classes`.
        img_size: Image size (0: that of its name).

    Raises:
        ValueError: Its image size cannot be set, or it has not the parts of a plain vision transformer.
        FileNotFoundError: The weights that `checkpoint_path` names are not there.
    """
    arguments: dict[str, Any] = {**shape, **({'img_size': img_size} if img_size else {}), **recipe.model_args}
    if recipe.run.chunk_size != 'auto':
        arguments['chunk_size'] = recipe.run.chunk_size
    check_weights_file(str(arguments.get('checkpoint_path', '')))
    try:
        model: Any = timm.create_model(recipe.model, **arguments)  # declared as any Module
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        raise ValueError(no_recipe_for(recipe.model, 'its image size cannot be set')) from error
    parts = {'blocks': model, 'embed_dim': model, 'patch_embed': model, 'get_classifier': model}
    parts |= {name: getattr(model, 'patch_embed', None) for name in ('proj', 'img_size', 'patch_size', 'num_patches')}
    for name, owner in parts.items():
        if not hasattr(owner, name):
            raise ValueError(no_recipe_for(recipe.model, f'it is no plain vision transformer, and has no {name}'))
    if recipe.task == 'masked_pixels':
        masked_pixels.adapt(model)
    return model


def no_recipe_for(name: str, why: str) -> str:
    """An error's words."""
    return (
        f'{name} cannot be trained by a recipe: {why}. Models that can: linformer_vit_*, vit_*, deit_*, and others '
        'that have their parts and take img_size.'
    )


def empty_model(recipe: Recipe, shape: dict[str, int], made_for: int = 0, img_size: int = 0) -> VisionTransformer:
    """The recipe's model on the meta device, without memory for its weights, to ask what it is and costs.

    Args:
        recipe: The recipe.
        shape: As for `create_model`; may be empty.
        made_for: Image size that it is made for (0: that of its name).
        img_size: Image size that it then has, as in a stage of a run (0: the same).
    """
    with torch.device('meta'):
        model = create_model(recipe, shape, made_for)
        if img_size:
            set_size(model, img_size)
    return model


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what it leaves open: what the weights it starts from decide, and the span of local convolutions.

    A recipe that names no model takes that of its weights, and their image size. A local convolution keeps the part of
    the image that it spans where images grow, since a kernel that spans less than it was trained for means something
    else: `local_grid` is that of the weights, or, where these say nothing, the token grid of the first stage. (On
    Fashion-MNIST 84.3 % instead of 82.1 %.) `model_args` may say otherwise.

    Raises:
        ValueError: It names neither model nor weights.
    """
    if recipe.data.native_sizes:  # a graph is made for each size: not where it is not asked for
        whole = 'off' if recipe.run.compile == 'auto' else recipe.run.compile
        recipe = recipe.replace(model_args={**recipe.model_args, 'dynamic_img_size': True}, compile=whole)
    if not recipe.init:
        if not recipe.model:
            raise ValueError('The recipe names no model: say --init, for that of the weights there, or --model.')
        return with_span_of_first_stage(recipe)
    check_source(recipe.init)
    with torch.device('meta'):
        source = load_source(recipe.init, f'No model in {recipe.init!r}', weights=False)
    grid = next((module.grid for module in source.modules() if isinstance(module, LocalPath)), None)
    if not recipe.model:
        kept = {k: v for k, v in get_model_args(source).items() if k not in ('img_size', 'in_chans', 'num_classes')}
        data = recipe.data
        size = data.img_size if data.img_size or data.stages else side_of(source)
        name = source.pretrained_cfg['architecture']
        recipe = recipe.replace(model=name, model_args=kept | recipe.model_args, img_size=size)
    elif grid and is_ours(recipe.model):
        recipe = recipe.replace(model_args={'local_grid': grid} | recipe.model_args)
    return recipe if grid else with_span_of_first_stage(recipe)


def with_span_of_first_stage(recipe: Recipe) -> Recipe:
    """With the token grid of its first stage as `local_grid`, where images grow and the model has use for it."""
    sizes = [size for size, _ in recipe.data.stages]
    grow = bool(sizes) and 0 < sizes[0] < max(sizes)
    if not grow or 'local_grid' in recipe.model_args or not is_ours(recipe.model):
        return recipe
    model = empty_model(recipe, {}, sizes[0])
    if not any(isinstance(module, LocalPath) for module in model.modules()):
        return recipe
    height, width = model.patch_embed.grid_size
    grid = height if height == width else (height, width)
    return recipe.replace(model_args={**recipe.model_args, 'local_grid': grid})


def is_ours(name: str) -> bool:
    """Whether a model's name is one of linvision's."""
    return is_model_in_modules(name, ['registry'])


def can_stream(model: nn.Module) -> bool:
    """Whether its blocks can run in chunks of tokens, each computed again in the backward pass."""
    return isinstance(model, LinformerVisionTransformer)


def compile_blocks(model: VisionTransformer, wanted: str, device: torch.device) -> bool:
    """Compile the blocks of a model where a recipe wants it; whether they are.

    'auto' wants it on CUDA cards that Triton knows, for our models, whose blocks share one graph.
    """
    ours = isinstance(model, LinformerVisionTransformer)
    if wanted == 'auto' and ours and device.type == 'cuda' and importlib.util.find_spec('triton'):
        wanted = 'on' if torch.cuda.get_device_capability(device) >= (7, 0) else 'off'
    if wanted != 'on':
        return False
    if isinstance(model, LinformerVisionTransformer):
        model.set_compile('inductor')
    else:
        for block in model.blocks:
            block.compile()
    return True


def needs_batch(model: nn.Module) -> bool:
    """Whether it normalises over the images that are together, so that a batch cannot be divided."""
    return isinstance(model, LinformerVisionTransformer) and model.needs_batch


def check_batch(model: nn.Module, recipe: Recipe, processes: int) -> None:
    """Raise ValueError where a model that needs the whole batch would get a part of it, or a single image."""
    data = recipe.data
    if needs_batch(model) and (processes * data.accumulate > 1 or data.batch_size < 2):
        raise ValueError(
            'head_norm normalises over the images that are together: it needs one process, accumulate 1 and at '
            f'least 2 images, got {processes}, {data.accumulate} and a batch_size of {data.batch_size}.'
        )


def freeze(model: VisionTransformer, blocks: int) -> None:
    """Let the first blocks, and all that stands before them, not learn; -1 leaves nothing but the head.

    Raises:
        ValueError: There are not so many blocks.
    """
    if blocks > len(model.blocks):
        raise ValueError(f'freeze must be at most the {len(model.blocks)} blocks that there are, got {blocks}.')
    if not blocks:
        return
    model.requires_grad_(False)
    learning: list[nn.Module | nn.Parameter] = [model.get_classifier()]
    if blocks > 0:
        after = ('norm', 'fc_norm', 'attn_pool')
        learning += [*model.blocks[blocks:], *(m for m in (getattr(model, name, None) for name in after) if m)]
        if isinstance(model, LinformerVisionTransformer) and model.projection is not None:
            layers = range(blocks, len(model.blocks))
            learning += [model.projection.weights[i] for layer in layers for i in model.projection.indices(layer)]
    for part in learning:
        part.requires_grad_(True)


def side_of(model: VisionTransformer) -> int:
    """Side of the images of a model that takes squares, in pixels.

    Raises:
        ValueError: The model takes no squares.
    """
    height, width = model.patch_embed.img_size
    if height != width:
        raise ValueError(
            f'The model takes images of {height}×{width} pixels, and those of a set are read as squares: name the side '
            f'of one (--img-size {max(height, width)}), or call the model from Python.'
        )
    return int(height)


def set_size(model: VisionTransformer, img_size: int) -> None:
    """Give the model another image size, unless it has it."""
    if tuple(model.patch_embed.img_size) == (img_size, img_size):
        return
    if not hasattr(model, 'set_input_size'):
        raise ValueError(nearest('way to change the image size of', type(model).__name__, ['linformer_vit_*', 'vit_*']))
    model.set_input_size(img_size=(img_size, img_size))


def idle_projection(model: nn.Module) -> Projection | None:
    """The E of a model, where no layer uses it at the present size, since K is not below N."""
    if not isinstance(model, LinformerVisionTransformer):
        return None
    grid = model.patch_embed.grid_size
    return model.projection if all(block.attn.is_full(grid) for block in model.blocks) else None


def count_tokens(model: VisionTransformer) -> int:
    """Tokens of one image at the model's present size."""
    return model.patch_embed.num_patches
