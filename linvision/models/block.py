"""A transformer block over projected keys and values:

    x ← x + attention(norm1(x))
    x ← x + mlp(norm2(x))

with layer scale and drop path on both branches, as in timm's `Block`. Once the keys and values of a block are known,
everything else in it acts on each token alone (the local path needs a row of neighbours too). So `forward` runs it on
the whole sequence, which can be traced, or chunk by chunk (`streaming/stream.py`); `add_attention` and `add_mlp` are
the equation of both. With `token_norm` each norm needs the mean and variance of all tokens first.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import timm.layers
import torch
from timm.layers import DropPath, GluMlp, LayerScale, LayerType, SwiGLU, SwiGLUPacked
from torch import Tensor, nn

from linvision.compiled import compiled, looked_into, open_sizes
from linvision.models.attention import LinformerAttention
from linvision.models.mlp import Mlp
from linvision.models.norms import LayerNorm, TokenNorm
from linvision.streaming.parts import drop_path_scales, scaled
from linvision.streaming.stream import stream

# timm has no names for them
MLPS: dict[str, Any] = {'mlp': Mlp, 'glu': GluMlp, 'swiglu': SwiGLU, 'swiglu_packed': SwiGLUPacked}


class LinformerBlock(nn.Module):
    """Pre-norm block with timm's names and arguments; the attention runs over K projected rows.

    Args:
        rows: The K rows of this block as a grid (K_h, K_w); (0, 0) for full attention.
        projection: Name of the projection, or 'none'.
        sharing: How E and F are shared.
        num_prefix_tokens: Tokens that bypass E.
        local_size: Side of the local path's kernel, 0 for none.
        local_grid: Token grid that the local path's kernel is made for; (0, 0) for any.
        row_norm: Normalise the K projected rows.
        rotary, rotate_half, gated: As in `LinformerAttention`.
        token_norm: Normalise each channel over an image's tokens, in place of `norm_layer` before attention and MLP;
            without prefix tokens (class and register tokens).
        mlp_layer: A class of timm's, or its name in `MLPS`.
        attn_layer: Must stay timm's default: the attention of this block is its own.
        depth: Index of this block, which timm gives to every block.

    The other arguments are those of `timm.models.vision_transformer.Block`.

    Raises:
        ValueError: `token_norm` with prefix tokens.
    """

    token_norm: Final[bool]  # TorchScript compiles what it chooses, and no more

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rows: tuple[int, int],
        projection: str = 'linear',
        sharing: str = 'layerwise',
        num_prefix_tokens: int = 0,
        local_size: int = 0,
        local_grid: tuple[int, int] = (0, 0),
        row_norm: bool = False,
        token_norm: bool = False,
        rotary: bool = False,
        rotate_half: bool = False,
        gated: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] = LayerNorm,
        mlp_layer: str | type[nn.Module] = Mlp,
        attn_layer: LayerType | None = None,
        depth: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if token_norm and num_prefix_tokens:
            raise ValueError(
                'token_norm=True takes tokens of the image alone: class_token must be False and reg_tokens 0, got '
                f'{num_prefix_tokens} such tokens.'
            )
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        scale = partial(LayerScale, dim, init_values=init_values, **dd) if init_values else nn.Identity
        self.compiles = ''  # backend of torch.compile for this block; see the model's `set_compile`
        self.token_norm = token_norm
        self.hidden = int(dim * mlp_ratio)  # width of the MLP's hidden layer
        make_norm: Any = TokenNorm if token_norm else norm_layer
        self.norm1 = make_norm(dim, **dd)
        self.attn = LinformerAttention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            projection=projection,
            sharing=sharing,
            rows=rows,
            num_prefix_tokens=num_prefix_tokens,
            local_size=local_size,
            local_grid=local_grid,
            row_norm=row_norm,
            rotary=rotary,
            rotate_half=rotate_half,
            gated=gated,
            **dd,
        )
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = make_norm(dim, **dd)
        make_mlp: Any = MLPS[mlp_layer] if isinstance(mlp_layer, str) else mlp_layer
        make_mlp = Mlp if make_mlp is timm.layers.Mlp else make_mlp
        self.mlp = make_mlp(
            in_features=dim,
            hidden_features=self.hidden,
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **dd,
        )
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        projection: list[Tensor] | None = None,
        grid: tuple[int, int] | None = None,
        valid: Tensor | None = None,
        chunk_size: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """On the whole sequence or streamed: (B, P + N, D) -> (B, P + N, D).

        Args:
            x: Tokens.
            projection: This layer's tensors, from the model's `Projection.forward`. Required; the default is there for
                `nn.Sequential`, which TorchScript compiles with one argument.
            grid: Token grid (height, width). Required.
            valid: Which tokens are not padding, (B, P + N), boolean; all of them by default.
            chunk_size: Images × tokens in a chunk, 0 for the whole sequence.
            out: Where a streamed block without gradients may write its result.

        Raises:
            ValueError: Called without the model's projection and grid.
        """
        if projection is None or grid is None:
            raise ValueError('A block needs its projection tensors and token grid, which the model passes to it.')
        if not torch.jit.is_scripting():
            if chunk_size > 0:
                return stream(self, x, projection, grid, valid, chunk_size, out)
            if runs_compiled(self, x):
                scales = drop_path_scales(self, x)
                for tensor in (x, valid, *scales):
                    open_sizes(tensor, 0)
                return compiled(whole, self.compiles)(self, scales, x, projection, grid, valid)
        return self.run_whole(x, projection, grid, valid)

    def run_whole(self, x: Tensor, projection: list[Tensor], grid: tuple[int, int], valid: Tensor | None) -> Tensor:
        """The block on the whole sequence; arguments as of `forward`."""
        if self.token_norm:
            own = None if valid is None else self.attn.own(valid, grid)
            x = self.add_attention(x, self.attn(self.norm1(x, own), projection, grid, valid))
            return self.add_mlp(x, self.norm2(x, own))
        return self.residuals(x, self.attn(self.norm1(x), projection, grid, valid))

    def residuals(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual branches, once attention has given its output for these tokens: (B, n, D) -> (B, n, D)."""
        x = self.add_attention(x, attended)
        return self.add_mlp(x, self.norm2(x))

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The first residual branch: (B, n, D) -> (B, n, D)."""
        return x + self.drop_path1(self.ls1(attended))

    def add_mlp(self, x: Tensor, normalised: Tensor) -> Tensor:
        """The second residual branch, from the tokens and those normalised: (B, n, D) -> (B, n, D)."""
        return x + self.drop_path2(self.ls2(self.mlp(normalised)))


def runs_compiled(block: LinformerBlock, x: Any) -> bool:
    """Whether a whole block runs compiled: it is told to, and nothing looks into it or talks to other processes."""
    inner = (m for m in block.modules() if m is not block)
    alone = block.attn.band is None
    return bool(block.compiles) and alone and isinstance(x, Tensor) and not looked_into(*inner)


def whole(
    block: LinformerBlock,
    scales: list[Tensor],
    x: Tensor,
    projection: list[Tensor],
    grid: tuple[int, int],
    valid: Tensor | None,
) -> Tensor:
    """A block on the whole sequence, with drop path drawn before, as a function that all blocks can share compiled."""
    return type(block).run_whole(scaled(block, scales), x, projection, grid, valid)


if TYPE_CHECKING:

    class Blocks(nn.Sequential):
        """The blocks of a model, for the type checker: `nn.Sequential` says of none what it is."""

        def __iter__(self) -> Iterator[LinformerBlock]: ...
        def __getitem__(self, index: Any) -> Any: ...
