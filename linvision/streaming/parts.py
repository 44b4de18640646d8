"""What streaming knows of a block: its parts by name, and no class."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Grid = tuple[int, int]  # token grid (height, width)
KeysValues = tuple[
    Tensor, Tensor, Tensor | None
]  # keys and values, (B, H, P + K, D/H), and which to attend to, or None


class Weights(NamedTuple):
    """What makes queries, (D, D), and keys and values together, (2 D, D), of tokens; in the dtype of the products."""

    query: Tensor
    key_value: Tensor
    query_bias: Tensor | None
    key_value_bias: Tensor | None


class StreamedLocal(Protocol):
    """A convolution over the token grid: how far it reaches, and itself on whole rows of tokens."""

    reach: int

    def step(self, grid: Grid) -> tuple[int, int]: ...
    def rows_needed(self, grid: Grid) -> int: ...
    def convolve(self, x: Tensor, grid: Grid, step: tuple[int, int]) -> Tensor: ...


class StreamedKind(Protocol):
    """A kind of projection: whether E x can be had from parts of the sequence, and how (see `Kind`)."""

    by_parts: bool

    def partial(self, x: Tensor, factors: list[Tensor], own: slice, grid: Grid, rows: Grid) -> Tensor: ...
    def merge(self, a: Tensor, b: Tensor) -> Tensor: ...
    def total(self, part: Tensor, band: Any) -> Tensor: ...
    def finish(self, total: Tensor) -> Tensor: ...


class StreamedAttention(Protocol):
    """Attention that tells how its keys and values come about, and its output once they are known."""

    rows: Grid
    matrices: int
    by_head: bool
    rotary: bool
    num_prefix_tokens: int
    band: Any  # this process's part of each image (`models/band.py`); None for all of it
    qkv: Any  # modules, or what stands in for them
    q_norm: Any
    proj: Any

    @property
    def fused_attn(self) -> bool: ...
    @property
    def kind(self) -> StreamedKind: ...
    @property
    def local(self) -> StreamedLocal | None: ...
    def is_full(self, grid: Grid) -> bool: ...
    def split_weights(self, x: Tensor) -> Weights: ...
    def query(self, x: Tensor, weights: Weights, rope: Tensor | None = None) -> Tensor: ...
    def opening(self, x: Tensor) -> Tensor | None: ...
    def key_value(
        self,
        x: Tensor,
        projection: list[Tensor],
        grid: Grid,
        valid: Tensor | None,
        weights: Weights,
        rope: Tensor | None = None,
    ) -> KeysValues: ...
    def key_value_of_rows(
        self,
        rows: list[Tensor],
        prefix: Tensor,
        projection: list[Tensor],
        grid: Grid,
        valid: Tensor | None,
        weights: Weights,
    ) -> KeysValues: ...
    def output(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        local: Tensor | None,
        opening: Tensor | None = None,
    ) -> Tensor: ...


class StreamedBlock(Protocol):
    """A block: norms, attention, MLP, layer scale and drop path by timm's names, and the equation that joins them.

    Its parts are modules, or what stands in for them.
    """

    compiles: str  # backend of torch.compile for its equation; '' for none
    hidden: int  # width of the MLP's hidden layer
    training: bool
    norm1: Any

    @property
    def token_norm(self) -> bool: ...  # whether its norms need the mean and variance of all tokens
    @property
    def attn(self) -> StreamedAttention: ...

    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def residuals(self, x: Tensor, attended: Tensor) -> Tensor: ...
    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor: ...
    def add_mlp(self, x: Tensor, normalised: Tensor) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...


class BlockWith:
    """A block with some of its parts replaced, for the tokens of one pass: the equation stays the block's own.

    Args:
        block: The block.
        parts: What takes the place of its parts, by name: 'attn', 'mlp', 'drop_path1', 'drop_path2'.
    """

    def __init__(self, block: StreamedBlock, **parts: Any) -> None:
        self.equations: Any = type(block)
        self.attn: Any = None
        self.token_norm = block.token_norm
        for name in ('norm1', 'attn', 'ls1', 'drop_path1', 'norm2', 'mlp', 'ls2', 'drop_path2'):
            setattr(self, name, parts.get(name, getattr(block, name)))

    # the block's equations, with the parts that are here

    def residuals(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.equations.residuals(self, x, attended)

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.equations.add_attention(self, x, attended)

    def add_mlp(self, x: Tensor, normalised: Tensor) -> Tensor:
        return self.equations.add_mlp(self, x, normalised)


def drop_path_scales(block: StreamedBlock, x: Tensor) -> list[Tensor]:
    """What drop path multiplies the two branches of a block with, (B, 1, 1) each: timm's own draw; none without it."""
    if not block.training or isinstance(block.drop_path1, nn.Identity):
        return []
    ones = x.new_ones(x.shape[0], 1, 1)
    return [path(ones) for path in (block.drop_path1, block.drop_path2)]


def scaled(block: Any, scales: list[Tensor]) -> Any:
    """The block, whose drop path was drawn before."""
    if not scales:
        return block
    first, second = scales
    return BlockWith(block, drop_path1=lambda y: y * first, drop_path2=lambda y: y * second)


def draws_dropout(block: StreamedBlock) -> bool:
    """Whether the block draws dropout."""
    return block.training and any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in block.modules())
