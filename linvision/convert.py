"""From a plain ViT to a Linformer ViT with the same weights.

Notable here:

- Only the attention changes: its N keys and values become K rows. Every weight of the original has the same name and
  meaning in a Linformer ViT, so that with `projection='none'` the two are equal; E is all that is new.
- E starts as pooling by area: each row is the mean of a cell of the token grid. `fit_projection` then moves E alone,
  by gradient descent on the squared error of every layer's attention output, on images without labels.
- The architecture is read from the model itself, not from its name. What a Linformer ViT has no part for is refused
  with its reason: nothing is converted to something that is nearly the same.
"""

from collections.abc import Iterable, Sequence
from itertools import islice, product
from typing import Any

import timm
import torch
from timm.layers import (
    Attention,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGLU,
    get_act_layer,
    get_norm_layer,
    to_2tuple,
)
from timm.models import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from linvision.analysis.watched import watched
from linvision.eva import eva_arguments, eva_state
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.models.projection import Projection, row_grid
from linvision.models.projection_kinds import cell_size
from linvision.models.registry import SIZES, default_cfgs
from linvision.models.resize import resized_table

# as timm spells them: names can be saved, classes cannot
ACTIVATIONS = {get_act_layer(name): name for name in ('gelu', 'gelu_tanh', 'quick_gelu', 'silu', 'relu', 'mish')}
NORMS = {get_norm_layer(name): name for name in ('layernorm', 'layernormfp32', 'rmsnorm', 'rmsnormfp32', 'simplenorm')}
NORMS[nn.LayerNorm] = 'layernorm'
QKV = ('.attn.qkv', '.attn.q_proj', '.attn.k_proj', '.attn.v_proj')
DATA = ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation', 'label_names', 'license')


def from_vit(
    model: str | VisionTransformer,
    proj_len: int | Sequence[int] = 64,
    projection: str = 'linear',
    sharing: str = 'layerwise',
    **kwargs: Any,
) -> LinformerVisionTransformer:
    """A Linformer ViT with the weights of a plain ViT, and with an E that pools by area.

    It loads what timm's models load, reads images as the original does (`resolve_model_data_config`), and can be saved
    by `timm.models.save_for_hf` (but for norms and activations that timm has no name for).

    Args:
        model: A timm `VisionTransformer` (augreg, DeiT, DINO, CLIP, SigLIP and the like), or the name of one with
            pretrained weights, `local-dir:` and `hf-hub:` included. For a file of weights, give
            `timm.create_model(name, checkpoint_path=file)`.
        proj_len: K, or one K a layer where `sharing` allows.
        projection: 'linear', 'separable', 'conv', 'mean_pool', 'max_pool', 'dynamic' (which starts as soft cells), or
            'none' for full attention.
        sharing: 'layerwise', 'key_value', 'headwise' or 'none'.
        kwargs: Other arguments of `LinformerVisionTransformer` that the original has no say in: `img_size`,
            `local_size` (starts at zero), `row_norm`, `chunk_size`, drop rates.

    Raises:
        ValueError: A part of the model has no counterpart, an argument contradicts the original, or with 'conv' the
            cells of K rows do not divide the token grid.
    """
    original: Any = timm.create_model(model, pretrained=True) if isinstance(model, str) else model
    arguments = architecture(original)
    for name, value in kwargs.items():
        if arguments.get(name, value) != value and name not in ('img_size', 'dynamic_img_size'):
            raise ValueError(f'{name} is {arguments[name]!r} in the original, and cannot become {value!r}.')
    own = {'proj_len': proj_len, 'projection': projection, 'sharing': sharing, 'local_size': 0, 'row_norm': False}
    arguments |= own | kwargs
    weight = original.patch_embed.proj.weight
    ours: Any = timm.create_model(entry_point(arguments), **arguments)
    ours = ours.to(torch.promote_types(weight.dtype, torch.float32))  # else fp64 would lose digits on its way
    refuse_difference(ours, original)
    if projection == 'conv':
        refuse_cut_cells(ours.projection)
    state = eva_state(original) if type(original) is Eva else original.state_dict()
    if original.pos_embed is not None:
        state['pos_embed'] = resized_table(original.pos_embed.detach(), ours, original.patch_embed.grid_size)
    result = ours.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not name.startswith('projection.') and '.local.' not in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f'The weights do not match: {missing[:3]} are missing, {result.unexpected_keys[:3]} left over.'
        )
    if ours.projection is not None:
        ours.projection.pool()
    cfg = getattr(original, 'pretrained_cfg', None) or {}  # timm's factory sets it, the class does not
    kept = {k: cfg[k] for k in DATA if cfg.get(k) is not None}
    kept['input_size'] = (original.patch_embed.proj.in_channels, *original.patch_embed.img_size)
    ours.pretrained_cfg = {**ours.pretrained_cfg, 'tag': None, 'num_classes': original.num_classes, **kept}
    converted: LinformerVisionTransformer = ours.to(weight.device, weight.dtype).train(original.training)
    return converted


def architecture(model: VisionTransformer) -> dict[str, Any]:
    """The arguments that make a Linformer ViT of the shape of a plain ViT.

    Raises:
        ValueError: It has a part that a Linformer ViT does not have.
    """
    if isinstance(model, LinformerVisionTransformer):
        raise ValueError('The model is a Linformer ViT already.')
    eva = type(model) is Eva
    if not eva:
        refuse_type(model, VisionTransformer, 'the model')
    refuse_type(model.patch_embed, PatchEmbed, 'its patch embedding')
    if model.patch_embed.dynamic_img_pad:
        raise ValueError('The model cannot be converted: it pads images of any size (dynamic_img_pad), ours does not.')
    blocks: list[Any] = list(model.blocks)
    for block in blocks if not eva else []:
        refuse_type(block, Block, 'a block')
        refuse_type(block.attn, Attention, 'an attention')
    block = blocks[0]
    attn, mlp = block.attn, block.mlp
    own = eva_arguments(model, is_part) if eva else vit_arguments(model)
    if attn.num_heads * attn.head_dim != model.embed_dim:
        raise ValueError(
            f'The attention cannot be converted: its {attn.num_heads} heads of {attn.head_dim} are not as wide as the '
            f'tokens, {model.embed_dim}.'
        )
    arguments = {
        'img_size': tuple(model.patch_embed.img_size),
        'patch_size': tuple(model.patch_embed.patch_size),
        'in_chans': model.in_chans,
        'num_classes': model.num_classes,
        'global_pool': model.global_pool,
        'embed_dim': model.embed_dim,
        'depth': len(model.blocks),
        'num_heads': attn.num_heads,
        'qk_norm': is_part(attn.q_norm),
        'scale_attn_norm': is_part(attn.norm),
        'scale_mlp_norm': is_part(mlp.norm),
        'gated_attn': attn.gate is not None,
        'pos_embed': 'none' if model.pos_embed is None else 'learn',
        'no_embed_class': model.no_embed_class,
        'token_norm': False,
        'head_norm': False,
        'dynamic_img_size': model.dynamic_img_size,
        'pre_norm': is_part(model.norm_pre),
        'final_norm': is_part(model.norm) or is_part(model.fc_norm),
        'fc_norm': is_part(model.fc_norm),
        **mlp_arguments(mlp, model.embed_dim),
        **own,
    }
    norm = block.norm1
    if type(norm) is not LayerNorm or norm.eps != 1e-6:
        arguments['norm_layer'] = NORMS.get(type(norm), type(norm))
        if hasattr(norm, 'eps'):
            arguments['norm_eps'] = norm.eps
    return arguments


def vit_arguments(model: Any) -> dict[str, Any]:
    """Those of the arguments that `Eva` spells otherwise (see `eva.py`)."""
    block = model.blocks[0]
    return {
        'qkv_bias': block.attn.qkv.bias is not None,
        'proj_bias': block.attn.proj.bias is not None,
        'class_token': model.has_class_token,
        'reg_tokens': model.num_reg_tokens,
        'pool_include_prefix': model.pool_include_prefix,
        'rope': {},
        # the weights come from the original
        **({'init_values': 1.0} if isinstance(block.ls1, LayerScale) else {}),
    }


def mlp_arguments(mlp: Any, dim: int) -> dict[str, Any]:
    """Those of the arguments that are about the MLP."""
    arguments: dict[str, Any] = {}
    first: Any = None
    if isinstance(mlp, GluMlp):
        first, arguments['mlp_layer'] = mlp.fc1, 'glu' if mlp.gate_last else 'swiglu_packed'
    elif isinstance(mlp, SwiGLU):
        first, arguments['mlp_layer'] = mlp.fc1_g, 'swiglu'
    else:
        refuse_type(mlp, Mlp, 'an MLP')
        first = mlp.fc1
    hidden = first.out_features
    if type(mlp.act) is not nn.GELU:
        arguments['act_layer'] = ACTIVATIONS.get(type(mlp.act), type(mlp.act))
    ratio = hidden / dim
    return arguments | {'mlp_ratio': ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim}


def is_part(module: nn.Module) -> bool:
    """Whether an optional part is there."""
    return not isinstance(module, nn.Identity)


def refuse_type(module: nn.Module, wanted: type[nn.Module], what: str) -> None:
    """Raise ValueError for a module that is not of this very type: a subclass computes something else."""
    if type(module) is not wanted:
        own, others = type(module), f'{wanted.__module__}.{wanted.__qualname__}'
        raise ValueError(
            f'Only plain ViTs can be converted: {what} must be {others}, got {own.__module__}.{own.__qualname__}.'
        )


def refuse_difference(ours: nn.Module, theirs: nn.Module) -> None:
    """Raise ValueError where a layer of the original has no equal: another epsilon, activation or shape."""
    own = dict(ours.named_modules())
    for name, module in theirs.named_modules():
        heads = [getattr(part, 'num_heads', 0) for part in (module, own.get(name))]
        if heads[0] != heads[1] and name in own:  # no weight and no repr tells them
            raise ValueError(
                f'{name} cannot be converted: it has {heads[0]} heads, and a Linformer ViT has {heads[1]}.'
            )
        leaf = not any(module.children()) and not type(module).__name__.startswith(('Drop', 'PatchDrop'))
        leaf = leaf and not (type(theirs) is Eva and name.endswith(QKV))  # whose weights are put together
        if leaf and is_part(module) and repr(own.get(name)) != repr(module):
            raise ValueError(f'{name} cannot be converted: it is {module}, and a Linformer ViT has {own.get(name)}.')


def refuse_cut_cells(projection: Projection) -> None:
    """Raise ValueError where a `conv` would pool cells that the border cuts: its kernel gives no mean there."""
    grid = projection.grid
    for K, rows in zip(projection.proj_len, projection.row_grids, strict=True):
        if any(n % size for n, size in zip(grid, cell_size(grid, rows), strict=True)):
            whole = [(a, b) for a, b in product(*(range(1, n + 1) for n in grid)) if grid[0] % a == grid[1] % b == 0]
            fit = sorted(a * b for a, b in whole if row_grid(a * b) == (a, b) and (a, b) != grid)
            raise ValueError(
                f"With projection='conv' cells must divide the token grid {grid}, and those of proj_len={K} do not. "
                f'These do: {", ".join(map(str, fit))}.'
            )


def entry_point(arguments: dict[str, Any]) -> str:
    """The registered name of this width, patch and image size, or else another: all arguments are given anyhow."""
    size = next((k for k, v in SIZES.items() if v['embed_dim'] == arguments['embed_dim']), '')
    patch_size, img_size = (to_2tuple(arguments[k])[0] for k in ('patch_size', 'img_size'))
    names = (f'linformer_vit_{size}_patch{patch_size}_{img_size}', f'linformer_vit_{size}_patch16_224')
    return next((name for name in names if name in default_cfgs), 'linformer_vit_base_patch16_224')


def fit_projection(
    model: LinformerVisionTransformer,
    original: VisionTransformer,
    batches: Iterable[Tensor],
    steps: int = 200,
    lr: float = 3e-3,
) -> list[float]:
    """Move E so that every layer's attention puts out what the original's does; nothing else changes.

    The loss is the squared error of the attention's output over the original's square, mean over layers, each layer
    on the input that it has in the original; Adam takes one step a batch.

    Args:
        model: What `from_vit` made of the original, on the same device.
        original: The plain ViT.
        batches: Images as the original reads them, (B, C, height, width); labels are not needed.
        steps: Steps, at most as many as there are batches.
        lr: Learning rate at the start; it falls as a cosine, to zero after `steps`.

    Returns:
        The relative error (the root of the loss) before each step; nothing is dropped.

    Raises:
        ValueError: There is no E to fit: the projection has no parameters, or K is not below N. Or the weights are of
            half precision, in which the sums of squares overflow.
    """
    grid = model.patch_embed.grid_size
    weights = [] if model.projection is None else list(model.projection.parameters())
    if not weights:
        raise ValueError('There is nothing to fit: this projection has no parameters.')
    if weights[0].dtype != torch.promote_types(weights[0].dtype, torch.float32):
        raise ValueError(f'E is fitted in fp32, and the weights are {weights[0].dtype}: call float() on both models.')
    if any(block.attn.is_full(grid) for block in model.blocks):
        raise ValueError(
            f'There is nothing to fit: with K not below the {grid[0] * grid[1]} tokens attention is full. Choose a '
            'smaller proj_len, or larger images (img_size).'
        )
    optimizer = torch.optim.Adam(weights, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors, mode = [], model.training
    model.eval()
    for images in islice(batches, steps):
        seen = watched(original, [block.attn for block in original.blocks], images)
        tensors = model.projection_tensors(images, grid)
        terms = []
        for block, own, (x, wanted) in zip(model.blocks, tensors, seen, strict=True):
            terms.append((block.attn(x, own, grid) - wanted).square().sum() / wanted.square().sum())
        loss = torch.stack(terms).mean()
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
        schedule.step()
        errors.append(loss.item() ** 0.5)
    for weight in weights:
        weight.grad = None
    model.train(mode)
    return errors


@torch.no_grad()
def agreement(model: nn.Module, original: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """How near the outputs of two models are, in eval mode.

    Args:
        model: One.
        original: The other, on the same device.
        batches: Images as both read them, (B, C, height, width).

    Returns:
        `relative_error`, the norm of the difference of the logits (of the pooled features, where there is no
        classifier) over that of the original's; `same_top1`, the share of images of which both say the same class, and
        `num_samples`.
    """
    error = norm = same = count = 0.0
    modes = model.training, original.training
    model.eval(), original.eval()
    for images in batches:
        ours, theirs = model(images).cpu().double(), original(images).cpu().double()
        error, norm = error + (ours - theirs).square().sum().item(), norm + theirs.square().sum().item()
        same, count = same + (ours.argmax(1) == theirs.argmax(1)).sum().item(), count + len(images)
    model.train(modes[0]), original.train(modes[1])
    result = {'relative_error': (error / norm) ** 0.5, 'num_samples': int(count)}
    return result | ({'same_top1': same / count} if original.num_classes else {})
