"""The Linformer vision transformer: timm's `VisionTransformer` with attention over K projected rows.

Notable here:

- The model owns the projection, once, and hands each block its tensors; the blocks own everything else.
- Same state dict as timm's ViT: `load_state_dict` takes the weights of a plain ViT, only `projection.*` is new.
- Tokens are contiguous, (B, N, D), from the patch embedding on (timm's is a transposed view, copied at every step).
- `set_input_size` resizes the projection and the positions together.
"""

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_function, to_2tuple
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer, feature_take_indices
from torch import Tensor

from linvision.block import LinformerBlock
from linvision.nearest import nearest
from linvision.position import POSITIONS
from linvision.projection import Projection, check_projection, row_grid

_logger = logging.getLogger(__name__)


class LinformerVisionTransformer(VisionTransformer):
    """Vision transformer whose attention costs O(N·K) instead of O(N²) (Linformer, arXiv 2006.04768).

    Args:
        img_size: Image size, one number or (height, width).
        patch_size: Patch size; 1 makes every pixel a token.
        proj_len: K, the number of projected rows (the paper's k); a sequence gives one K a layer where `sharing`
            allows.
        projection: 'linear' (a learned K×N matrix), 'separable' (a learned matrix for each image axis) or 'none' (full
            attention).
        sharing: 'layerwise' (one matrix for all layers), 'key_value' (one a layer), 'headwise' (E and F a layer) or
            'none' (E and F for each head of each layer).
        local_size: Side of the depth-wise convolution beside each attention, 0 for a plain Linformer.
        pos_embed: 'learn' (timm's table), 'separable', 'conv', or 'none'.
        kwargs: Every other argument of `timm.models.vision_transformer.VisionTransformer`.

    Raises:
        ValueError: A choice that does not exist (the nearest are listed), K below 1, a width that the heads do not
            divide.
        TypeError: An argument that does not exist (the nearest are listed).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        proj_len: int | Sequence[int] = 64,
        projection: str = 'linear',
        sharing: str = 'layerwise',
        local_size: int = 0,
        pos_embed: str = 'learn',
        class_token: bool = True,
        reg_tokens: int = 0,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        known = {*inspect.signature(VisionTransformer).parameters, *inspect.signature(type(self)).parameters} - {
            'kwargs'
        }
        for name in kwargs:
            if name not in known:
                raise TypeError(nearest('model argument', name, known))
        if pos_embed not in ('', 'none', 'learn', *POSITIONS):
            raise ValueError(nearest('pos_embed', pos_embed, ['none', 'learn', *POSITIONS]))
        check_projection(projection, sharing, proj_len, depth)
        if kwargs.get('patch_drop_rate', 0.0) > 0 and (projection != 'none' or local_size):
            raise ValueError(
                f'patch_drop_rate must be 0: E needs every token of the grid, got {kwargs["patch_drop_rate"]}.'
            )
        if kwargs.get('dynamic_img_size', False):
            raise ValueError('dynamic_img_size is not supported yet: call model.set_input_size(img_size=...) instead.')
        if embed_dim % num_heads:
            raise ValueError(f'embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.')
        check_sizes(img_size, patch_size)
        dd = {'device': device, 'dtype': dtype}
        grid = tuple(s // p for s, p in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True))
        lengths = [proj_len] * depth if isinstance(proj_len, int) else list(proj_len)
        block_fn = partial(
            LinformerBlock,
            rows=[row_grid(k, grid) for k in lengths],
            projection=projection,
            sharing=sharing,
            num_prefix_tokens=int(class_token) + reg_tokens,
            local_size=local_size,
        )
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            pos_embed='none' if pos_embed in POSITIONS else pos_embed,
            class_token=class_token,
            reg_tokens=reg_tokens,
            block_fn=block_fn,
            **kwargs,
            **dd,
        )
        self.position = POSITIONS[pos_embed](embed_dim, grid, **dd) if pos_embed in POSITIONS else None
        self.projection = None
        if projection != 'none':
            self.projection = Projection(projection, sharing, proj_len, grid, depth, num_heads, **dd)
        self._log_full_attention()

    def _log_full_attention(self) -> None:
        """Say once for each size that layers with K >= N run full attention: E would not shorten the sequence."""
        grid = self.patch_embed.grid_size
        full = [i for i, block in enumerate(self.blocks) if block.attn.is_full(grid)]
        self.idle_projection = self.projection is not None and len(full) > 0
        if self.idle_projection:
            _logger.info(
                f'{len(full)} of {len(self.blocks)} layers run full attention: their K is not below the '
                f'{grid[0] * grid[1]} tokens. The projection is kept for larger images.'
            )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: timm's, the projections and the positions."""
        own = {n for n, _ in self.named_parameters() if n.startswith(('projection.', 'position.'))}
        return super().no_weight_decay() | own

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth; the projection and the positions belong to the stem."""
        groups = super().group_matcher(coarse=coarse)
        return dict(groups, stem=groups['stem'] + '|^projection|^position')

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Another image or patch size: patch embedding, positions and projection are resized together.

        Parameters are replaced: optimizers, EMA and DDP that refer to them must be rebuilt.

        Raises:
            ValueError: The image size is not a multiple of the patch size.
        """
        check_sizes(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(
            img_size=img_size and to_2tuple(img_size), patch_size=patch_size and to_2tuple(patch_size)
        )
        if self.position is not None:
            self.position.set_grid(self.patch_embed.grid_size)
        if self.projection is not None:
            self.projection.set_grid(self.patch_embed.grid_size)
        self._log_full_attention()

    def embed(self, x: Tensor) -> Tensor:
        """Images to contiguous tokens with positions and prefix: (B, C, height, width) -> (B, P + N, D)."""
        check_image(x, self.patch_embed.img_size, self.in_chans)
        x = self.patch_embed(x).contiguous()  # (B, N, D)
        if self.position is not None:
            x = self.position(x, self.patch_embed.grid_size)
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        if self.idle_projection:
            assert self.projection is not None
            x = x + self.projection.zero()  # so that its parameters still get a gradient: DDP waits for it
        return x

    def projection_tensors(self) -> list[list[Tensor]]:
        """Each layer's projection tensors (see `Projection.forward`); empty without a projection."""
        if self.projection is not None:
            return self.projection()
        empty: list[Tensor] = []
        return [empty] * len(self.blocks)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to normalised tokens: (B, C, height, width) -> (B, P + N, D)."""
        refuse_mask(attn_mask, is_causal)
        x = self.embed(x)
        projection = self.projection_tensors()
        grid = self.patch_embed.grid_size
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, projection[i], grid)
            else:
                x = block(x, projection[i], grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Features after chosen blocks; arguments and results are those of timm's `VisionTransformer`.

        Returns:
            Maps (B, D, h, w) at token resolution (or tokens (B, N, D) with `output_fmt='NLC'`), and the final tokens.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}.")
        refuse_mask(attn_mask, is_causal)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x = self.embed(x)
        projection = self.projection_tensors()
        grid = self.patch_embed.grid_size
        blocks = self.blocks if torch.jit.is_scripting() or not stop_early else self.blocks[: max_index + 1]
        intermediates = []
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, projection[i], grid)
            else:
                x = block(x, projection[i], grid)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm else x)

        P = self.num_prefix_tokens
        prefix = [y[:, :P] for y in intermediates]
        maps = [y[:, P:] for y in intermediates]
        if output_fmt == 'NCHW':
            maps = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in maps]  # (B, D, h, w)
        if output_dict:
            result = {'image_intermediates': maps}
            if P > 0 and return_prefix_tokens:
                result['image_intermediates_prefix'] = prefix
            if not intermediates_only:
                result['image_features'] = self.norm(x)
            return result
        if not torch.jit.is_scripting() and return_prefix_tokens and P > 0:
            maps = list(zip(maps, prefix, strict=True))
        if intermediates_only:
            return maps
        return self.norm(x), maps


def check_sizes(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Raise ValueError where an image does not divide into patches."""
    img_size, patch_size = to_2tuple(img_size), to_2tuple(patch_size)
    if any(p < 1 or s < p or s % p for s, p in zip(img_size, patch_size, strict=True)):
        raise ValueError(f'The image size must be a multiple of the patch size, got {img_size} and {patch_size}.')


@register_notrace_function
def check_image(x: Tensor, img_size: tuple[int, int], in_chans: int) -> None:
    """Raise ValueError for images of another size or number of channels than the model's."""
    if x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] != img_size[0] or x.shape[3] != img_size[1]:
        raise ValueError(
            f'Expected images of shape (B, {in_chans}, {img_size[0]}, {img_size[1]}), got {list(x.shape)}. Resize the '
            f'images, call model.set_input_size(img_size=...), or create the model with img_size=... and in_chans=...'
        )


@register_notrace_function
def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ValueError for masks that attention over projected rows cannot honour."""
    if is_causal:
        raise ValueError('Causal attention is impossible here: every projected row mixes tokens of the whole sequence.')
    if attn_mask is not None:
        raise ValueError('An N×N attn_mask means nothing over K projected rows; mask the images instead.')
