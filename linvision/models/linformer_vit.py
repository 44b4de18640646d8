"""The Linformer vision transformer: timm's `VisionTransformer` with attention over K projected rows.

Notable here:

- The model owns the projection, once, and hands each block its tensors; the blocks own everything else.
- Same state dict as timm's ViT but for `projection.*`, which `load_state_dict(strict=True)` misses in a plain ViT's.
- Tokens are contiguous, (B, N, D), from the patch embedding on (timm's is a transposed view, copied at every step).
- `set_input_size`, `dynamic_img_size` and checkpoints of another size resize the projection and the positions together.
- Padding is a `key_padding_mask` over tokens; what stands in padded pixels changes no output and no gradient.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import PatchDropout, get_norm_layer, to_2tuple
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer, feature_take_indices
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from linvision.autocast import InFp32, computes_in_fp32, in_compute_dtype
from linvision.models.band import Band, check_shared
from linvision.models.block import LinformerBlock
from linvision.models.checks import (
    check_arguments,
    check_image,
    check_indices,
    check_memory,
    check_pool_token,
    check_sizes,
    check_values,
    refuse_mask,
)
from linvision.models.mixed_sizes import pooled_features, refuse_padding, token_features, token_intermediates
from linvision.models.norms import LayerNorm
from linvision.models.padding import check_padding, check_pool, masked_pool, padded_pixels
from linvision.models.position import POSITIONS
from linvision.models.projection import Projection, projected_rows
from linvision.models.resize import resized_state, resized_table
from linvision.models.rotary import create_rope, rope_tensors
from linvision.rules import is_whole
from linvision.streaming.chunk_size import choose_chunk_sizes

if TYPE_CHECKING:
    from linvision.models.block import Blocks

_logger = logging.getLogger(__name__)


class LinformerVisionTransformer(VisionTransformer):
    """Vision transformer whose attention costs O(N·K) instead of O(N²) (Linformer, arXiv 2006.04768).

    Args:
        img_size: Image size, one number or (height, width).
        patch_size: Patch size; 1 makes every pixel a token.
        proj_len: K, the number of projected rows (the paper's k); a sequence gives one K a layer where `sharing`
            allows.
        projection: 'linear' (a learned K×N matrix), 'separable' (a learned matrix for each image axis), 'conv',
            'mean_pool', 'max_pool' (over cells of the token grid), 'dynamic' (weights that the tokens give) or 'none'
            (full attention).
        sharing: 'layerwise' (one matrix for all layers), 'key_value' (one a layer), 'headwise' (E and F a layer) or
            'none' (E and F for each head of each layer).
        local_size: Side of the depth-wise convolution beside each attention, 0 for a plain Linformer.
        local_grid: Token grid that the depth-wise convolutions are made for, one number or (height, width); on a finer
            grid their taps lie further apart. 0 for the grid of `img_size`; a registered name has that of its name.
        chunk_size: Images × tokens that a block handles at a time: 0 for all, 'auto' for what fits into cache, and in
            training for all unless that would keep more than 4 GiB; on a GPU as many blocks as fit take all, and the
            others chunks (see `chunk_size.py`). Results are equal but for rounding.
        row_norm: Normalise the K projected rows before the key and value weights (with `sharing='none'`, where weights
            come first, each head's rows of keys and of values); the paper does not.
        token_norm: In the blocks, normalise each channel over the tokens of an image (instance norm) in place of layer
            norm over the channels of a token; without class and register tokens. The weights have the names of those of
            layer norms: what loads them has to know which they are.
        pos_embed: 'learn' (timm's table), 'separable', 'conv', or 'none'.
        rope: Rotary positions: timm's 'rope_type', 'cat', 'mixed' or 'dinov3', and its arguments (see `rotary.py`);
            empty for none.
        gated_attn: Multiply the output of attention by a gate of each token and channel.
        norm_eps: Epsilon of all layer norms, 0 for that of `norm_layer`.
        head_norm: Normalise the pooled features over the images of a batch before the classifier (batch norm without
            weights, as in the linear probe of MAE, arXiv 2111.06377): for images that differ in few tokens, whose means
            are nearly equal. In training a batch must hold two images, and the engine takes one process and one part.
        kwargs: Every other argument of `timm.models.vision_transformer.VisionTransformer`. `mlp_layer` may be a name,
            'mlp', 'glu', 'swiglu' or 'swiglu_packed', which can be saved where a class cannot; with `dynamic_img_size`
            images may have any size, and projection and positions are resized on the fly.

    Raises:
        ValueError: A choice that does not exist (the nearest are listed), K below 1, a width that the heads do not
            divide.
        TypeError: An argument that does not exist (the nearest are listed).
    """

    if TYPE_CHECKING:
        blocks: Blocks

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
        local_grid: int | tuple[int, int] = 0,
        row_norm: bool = False,
        token_norm: bool = False,
        chunk_size: int | str = 'auto',
        pos_embed: str = 'learn',
        class_token: bool = True,
        reg_tokens: int = 0,
        rope: Mapping[str, Any] = MappingProxyType({}),
        gated_attn: bool = False,
        norm_eps: float = 0.0,
        head_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ('self', 'kwargs', '__class__')}
        check_arguments(type(self), {**given, **kwargs})
        rows = projected_rows(projection, sharing, proj_len, depth)
        check_memory({**given, **kwargs}, rows)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        grid = tuple(s // p for s, p in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True))
        local_grid = tuple(to_2tuple(local_grid)) if local_grid else grid
        rotary = create_rope(rope, embed_dim, depth, num_heads, **dd) if rope else None

        def block_fn(depth: int, **arguments: Any) -> LinformerBlock:
            return LinformerBlock(
                rows=rows[depth],
                projection=projection,
                sharing=sharing,
                num_prefix_tokens=int(class_token) + reg_tokens,
                local_size=local_size,
                local_grid=local_grid,
                row_norm=row_norm,
                token_norm=token_norm,
                rotary=bool(rope),
                rotate_half=getattr(rotary, 'rotate_half', False),
                gated=gated_attn,
                **arguments,
            )

        norm_layer = get_norm_layer(kwargs.get('norm_layer')) or TimmLayerNorm
        norm_layer = LayerNorm if norm_layer is TimmLayerNorm else norm_layer
        kwargs['norm_layer'] = partial(norm_layer, eps=norm_eps) if norm_eps else norm_layer
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            pos_embed='none' if pos_embed in POSITIONS else pos_embed,
            class_token=class_token,
            reg_tokens=reg_tokens,
            block_fn=block_fn,  # type: ignore[arg-type]  # timm only calls it
            **kwargs,
            **dd,
        )
        if kwargs.get('weight_init') == 'skip':  # timm leaves them as memory was
            for table in (self.pos_embed, self.cls_token, self.reg_token):
                if table is not None:
                    nn.init.trunc_normal_(table, std=0.02)
        self.band: Band | None = None  # this process's part of each image, where several share it: see `share_images`
        self.position = POSITIONS[pos_embed](embed_dim, grid, local_grid, **dd) if pos_embed in POSITIONS else None
        self.rope = rotary
        self.head_norm = nn.BatchNorm1d(embed_dim, affine=False, **dd) if head_norm else nn.Identity()
        self.projection = None
        if projection != 'none':
            self.projection = Projection(projection, sharing, rows, grid, num_heads, embed_dim, **dd)
        self.token_norm = token_norm
        self.needs_batch = head_norm  # training needs two images or more together, in one process and one part
        # whether a padding mask that hides whole images is refused: on an accelerator the question waits for the answer
        self.looks_at_padding = True
        self.set_chunk_size(chunk_size)
        self.register_load_state_dict_pre_hook(resize_on_load)
        self._log_full_attention()

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise the weights as timm's `init_weights`; on the meta device, which holds none, do nothing."""
        if not self.patch_embed.proj.weight.is_meta:
            super().init_weights(mode, needs_reset)

    def _log_full_attention(self) -> None:
        """Say once for each size that layers with K >= N run full attention: E would not shorten the sequence."""
        grid = self.patch_embed.grid_size
        full = [i for i, block in enumerate(self.blocks) if block.attn.is_full(grid)]
        if self.projection is not None and full:
            _logger.info(
                f'{len(full)} of {len(self.blocks)} layers run full attention: their K is not below the '
                f'{grid[0] * grid[1]} tokens. The projection is kept for larger images.'
            )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: timm's, the projections and the positions."""
        own = {n for n, _ in self.named_parameters() if n.startswith(('projection.', 'position.', 'rope.'))}
        return super().no_weight_decay() | own

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth: a layer's own E belongs to its block, a shared E and the positions to the stem."""
        groups = super().group_matcher(coarse=coarse)
        own = [[] if self.projection is None else self.projection.indices(i) for i in range(len(self.blocks))]
        layers = [(rf'^projection\.weights\.(?:{"|".join(map(str, n))})$', (i,)) for i, n in enumerate(own) if n]
        stem = groups['stem'] + '|^position|^rope' + ('' if layers else '|^projection')
        return dict(groups, stem=stem, blocks=[*groups['blocks'], *layers])

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Another image or patch size: patch embedding, positions and projection are resized together.

        Parameters are replaced: optimizers, EMA and DDP that refer to them must be rebuilt.

        Raises:
            ValueError: The image size is not a multiple of the patch size.
        """
        check_sizes(
            self.patch_embed.img_size if img_size is None else img_size,
            self.patch_embed.patch_size if patch_size is None else patch_size,
        )
        table, grid = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(
            img_size=img_size and to_2tuple(img_size), patch_size=patch_size and to_2tuple(patch_size)
        )
        if table is not None and grid != self.patch_embed.grid_size:  # of as many tokens timm leaves it
            self.pos_embed = nn.Parameter(resized_table(table.detach(), self, grid), requires_grad=table.requires_grad)
        if self.band is not None:
            check_shared(self, self.band.count)
        if self.position is not None:
            self.position.set_grid(self.patch_embed.grid_size)
        if self.projection is not None:
            self.projection.set_grid(self.patch_embed.grid_size)
        self._log_full_attention()

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Keep the blocks that the chosen intermediates need, and their projections; as timm's, which says more."""
        check_indices(indices, len(self.blocks))
        kept = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.projection is not None:
            self.projection.truncate(len(self.blocks))
        return kept

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier, and another pooling if one is named; as timm's.

        Raises:
            ValueError: There can be no such classifier or pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        check_values({'num_classes': num_classes, 'global_pool': pool})
        check_pool_token(pool, self.has_class_token)
        super().reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def set_chunk_size(self, chunk_size: int | str) -> None:
        """How blocks are run: 0 whole, a number of images × tokens at a time, or 'auto'.

        Raises:
            ValueError: Anything else.
        """
        if chunk_size != 'auto' and not is_whole(chunk_size, 0):
            raise ValueError(f"chunk_size must be 'auto', 0 or a number of tokens, got {chunk_size!r}.")
        self.chunk_size = chunk_size

    @torch.jit.ignore
    def share_images(self, mesh: DeviceMesh) -> None:
        """From now on, take a band of rows of each image, and give the logits of the whole image in every process.

        Every process of the mesh calls the model with its own rows of the same images, and of their `key_padding_mask`;
        `model.band.rows(height)` says which rows of the token grid these are. Results are equal to those of one process
        but for rounding. The mean of the processes' gradients, as DDP and FSDP2 take it, is the gradient of one process
        (`band.py` says why). Drop path, and dropout before the head, are drawn in each process: seed them alike.

        Args:
            mesh: The processes that share an image, in one dimension: that of several which has a name, as in
                `init_device_mesh('cuda', (2, 4), mesh_dim_names=('data', 'sequence'))['sequence']`.

        Raises:
            ValueError: The mesh has several dimensions, or the model needs all tokens of an image in one place.
        """
        if mesh.ndim != 1:
            raise ValueError(f'Processes share an image along one dimension of a mesh: choose it by name, got {mesh}.')
        check_shared(self, mesh.size())
        self.band = Band(mesh)
        of_blocks = (part for block in self.blocks for part in (block.attn, block.norm1, block.norm2))
        parts: list[Any] = [self.position, *of_blocks]
        for part in parts:
            if hasattr(part, 'band'):
                part.band = self.band
        self.patch_embed.strict_img_size = False  # it has no say in how large a band is: `check_image` has

    @torch.jit.ignore
    def set_compile(self, backend: str) -> None:
        """Let blocks run compiled: 'inductor', or another backend of `torch.compile`; '' for not.

        The same graphs serve all blocks, and all chunks of streamed ones (`compiled.py`), whatever the batch; training,
        inference, a batch of one image and another image size have their own.
        """
        # dynamo asks every tensor whether it has a gradient, and PyTorch warns of the question
        warnings.filterwarnings('ignore', 'The .grad attribute of a Tensor that is not a leaf')
        for block in self.blocks:
            block.compiles = backend

    def embed(
        self, x: Tensor, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int], Tensor | None, list[int]]:
        """Images to contiguous tokens with positions and prefix.

        Args:
            x: Images, (B, C, height, width).
            key_padding_mask: See `forward`.

        Returns:
            Tokens, (B, P + N, D), their grid (height, width), which of them are not padding, (B, P + N) or None, and
            how many each block is to handle at a time (0 for all). Tokens are those of this process's band, where
            several share an image; grid and padding those of the image.
        """
        grid, img_size = self.patch_embed.grid_size, self.patch_embed.img_size
        own = grid  # of the tokens that this process has
        if self.band is not None:
            own = self.band.grid(grid)
            img_size = (own[0] * self.patch_embed.patch_size[0], img_size[1])
        check_image(x, img_size, self.in_chans, self.patch_embed.patch_size, self.dynamic_img_size)
        if self.dynamic_img_size:
            own = grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        inside: Tensor | None = None
        all_inside: Tensor | None = None
        if key_padding_mask is not None:
            check_padding(key_padding_mask, x.shape[0], own, self.looks_at_padding and self.band is None)
            inside = all_inside = ~key_padding_mask.unsqueeze(-1)  # (B, N, 1)
            if self.band is not None:
                padding = self.band.whole(key_padding_mask, grid)
                check_padding(padding, x.shape[0], grid, self.looks_at_padding)
                all_inside = ~padding.unsqueeze(-1)
            x = x.masked_fill(padded_pixels(key_padding_mask, own, self.patch_embed.patch_size), 0.0)
        x = self.patch_embed(x)
        if self.dynamic_img_size:
            x = x.flatten(1, 2)  # (B, h, w, D) -> (B, N, D)
        x = x.contiguous()
        if inside is not None:
            x = x.masked_fill(~inside, 0.0)  # without its bias: the positions look at neighbours
        chunks = [0] * len(self.blocks)
        if not torch.jit.is_scripting():
            drops_patches = self.training and isinstance(self.patch_drop, PatchDropout)
            if drops_patches and inside is not None:
                raise ValueError(
                    'In training patch_drop_rate must be 0 with a key_padding_mask, which is for all tokens, got '
                    f'{self.patch_drop.prob}.'
                )
            chunks = choose_chunk_sizes(self.chunk_size, x, list(self.blocks), on_grid=not drops_patches)
            if self.band is not None and self.chunk_size == 'auto':
                chunks = self.band.agreed(chunks, x)
        if self.position is not None:
            x = self.position(x, grid, chunks[0])
        if self.dynamic_img_size:
            x = x.unflatten(1, grid)  # what timm's table of positions wants
        empty = isinstance(x.shape[0], int) and x.shape[0] == 0
        if empty:  # timm's `_pos_embed` cannot tell the shape of no images: zeros stand in for one
            x = torch.cat([x, x.new_zeros([1] + list(x.shape[1:]))])
        x = self._pos_embed(x) if self.band is None else self.pos_embed_band(x)
        if self.position is not None:
            x = self.pos_drop(x)  # which timm's `_pos_embed` draws only for a table
        if empty:
            x = x[:0]
        x = in_compute_dtype(self.norm_pre(self.patch_drop(x)))  # so the residual stream, whatever the positions are
        if self.projection is not None:
            idle = False
            for block in self.blocks:
                idle = idle or block.attn.is_full(grid)
            if idle:  # some layers do not use it; DDP waits for its gradient
                x = self.projection.zero(x)
        valid: Tensor | None = None
        if all_inside is not None:
            valid = F.pad(all_inside.squeeze(-1), (self.num_prefix_tokens, 0), value=True)
        return x, grid, valid, chunks

    @torch.jit.unused
    def pos_embed_band(self, x: Tensor) -> Tensor:
        """timm's `_pos_embed`, whose table has the positions of the whole image, for this process's tokens."""
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        if self.pos_embed is None:
            return x
        assert self.band is not None, 'it is for a band alone'
        P = self.num_prefix_tokens
        table = F.pad(self.pos_embed, (0, 0, P, 0)) if self.no_embed_class else self.pos_embed
        return x + self.band.tokens(table, self.patch_embed.grid_size, P)

    def projection_tensors(self, x: Tensor, grid: tuple[int, int]) -> list[list[Tensor]]:
        """Each layer's projection tensors (see `Projection.forward`), and its sines and cosines where it rotates."""
        tensors: list[list[Tensor]] = []
        if self.projection is not None:
            tensors = self.projection(x, grid)
        else:
            empty: list[Tensor] = []
            tensors = [empty] * len(self.blocks)
        if self.rope is not None:
            ropes = rope_tensors(self.rope, grid, len(tensors))
            tensors = [[*own, rope] for own, rope in zip(tensors, ropes, strict=False)]  # a pruned model has fewer
        return tensors

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Images to logits.

        Args:
            x: Images, (B, C, height, width), or a batch of different sizes in timm's NaFlex form, a dictionary (see
                `mixed_sizes.py`).
            attn_mask: Refused; it is here because timm's models have it.
            is_causal: Refused.
            key_padding_mask: Which tokens are padding, (B, N), boolean, true for those to ignore, as in
                `torch.nn.MultiheadAttention`. At least one token of an image must be real.

        Raises:
            ValueError: An N×N or causal mask, a padding mask of the wrong shape or dtype, or one with a `global_pool`
                that cannot leave out padding or with a `patch_drop_rate`.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, dict):
                refuse_mask(attn_mask, is_causal, key_padding_mask)
                refuse_padding(key_padding_mask)
                return self.classify(pooled_features(self, x))
            if computes_in_fp32(self, x):
                return InFp32(self, 'forward').compute(x, attn_mask, is_causal, key_padding_mask)
        if isinstance(key_padding_mask, Tensor):
            check_pool(self.global_pool)  # before the blocks run
        x = self.forward_features(x, attn_mask, is_causal, key_padding_mask)
        return self.forward_head(x, key_padding_mask=key_padding_mask)

    def forward_head(self, x: Tensor, pre_logits: bool = False, key_padding_mask: Tensor | None = None) -> Tensor:
        """Tokens to logits, or to the pooled features before the classifier; padded tokens are left out of the mean."""
        if self.band is not None:
            padding = key_padding_mask if isinstance(key_padding_mask, Tensor) else None
            how = (self.global_pool, self.num_prefix_tokens, self.patch_embed.grid_size)
            x = self.band.pool(x, *how, padding, self.pool_include_prefix)
        elif isinstance(key_padding_mask, Tensor):
            x = masked_pool(x, self.global_pool, self.num_prefix_tokens, key_padding_mask, self.pool_include_prefix)
        else:
            x = self.pool(x)
        return self.classify(self.fc_norm(x), pre_logits)

    def classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled and normalised features to logits: (B, D) -> (B, classes)."""
        if self.global_pool:  # tokens that were not pooled are no images' features
            x = self.head_norm(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Images to normalised tokens: (B, C, height, width) -> (B, P + N, D); arguments as in `forward`.

        Of images of different sizes it gives what timm's naflexvit does: see `mixed_sizes.token_features`.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, dict):
                refuse_mask(attn_mask, is_causal, key_padding_mask)
                refuse_padding(key_padding_mask)
                return token_features(self, x)
            if computes_in_fp32(self, x):
                return InFp32(self, 'forward_features').compute(x, attn_mask, is_causal, key_padding_mask)
        refuse_mask(attn_mask, is_causal, key_padding_mask)
        # isinstance, not `is not None`: under FX every argument is a proxy
        x, grid, valid, chunks = self.embed(x, key_padding_mask if isinstance(key_padding_mask, Tensor) else None)
        projection = self.projection_tensors(x, grid)
        # without gradients two buffers take turns; the embedding is none of them: a hook may hold it
        spare: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, projection[i], grid, valid, chunks[i], use_reentrant=False)
            elif chunks[i] > 0:
                previous = x
                x = block(x, projection[i], grid, valid, chunks[i], spare)
                spare = previous if i > 0 else None
            else:
                x = block(x, projection[i], grid, valid)
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
        key_padding_mask: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Features after chosen blocks; arguments and results are those of timm's `VisionTransformer`.

        Returns:
            Maps (B, D, h, w) at token resolution (or tokens (B, N, D) with `output_fmt='NLC'`), and the final tokens.
            Of images of different sizes tokens alone: see `mixed_sizes.token_intermediates`.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}.")
        refuse_mask(attn_mask, is_causal, key_padding_mask)
        if not torch.jit.is_scripting():
            check_indices(indices, len(self.blocks))
            if isinstance(x, dict):
                refuse_padding(key_padding_mask)
                how = (output_fmt, intermediates_only, output_dict, return_prefix_tokens)
                return token_intermediates(self, x, *how, indices=indices, norm=norm, stop_early=stop_early)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, grid, valid, chunks = self.embed(x, key_padding_mask if isinstance(key_padding_mask, Tensor) else None)
        projection = self.projection_tensors(x, grid)
        blocks = self.blocks if torch.jit.is_scripting() or not stop_early else self.blocks[: max_index + 1]
        intermediates = []
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, projection[i], grid, valid, chunks[i], use_reentrant=False)
            else:
                x = block(x, projection[i], grid, valid, chunks[i])
            if i in take_indices:
                intermediates.append(self.norm(x) if norm else x)

        P = self.num_prefix_tokens
        prefix = [y[:, :P] for y in intermediates]
        maps = [y[:, P:] for y in intermediates]
        if output_fmt == 'NCHW':
            maps = [y.unflatten(1, (-1, grid[1])).permute(0, 3, 1, 2).contiguous() for y in maps]  # (B, D, h, w)
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


def resize_on_load(model: 'LinformerVisionTransformer', state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook of `load_state_dict`: a checkpoint of another image size, patch size or K is resized to the model's."""
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    state_dict.update({prefix + k: v for k, v in resized_state(own, model).items()})


# functions of another module, which a trace calls as they are
torch.fx.wrap('check_image')
torch.fx.wrap('in_compute_dtype')
torch.fx.wrap('refuse_mask')
