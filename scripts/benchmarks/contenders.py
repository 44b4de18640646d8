"""What the benchmarks measure: linvision and what people use today, at one size, from image to logits.

All have the width, depth, heads and classes of `SIZE` and one token a pixel; the packages `linformer` and
`linformer-pytorch`, which know no images, get timm's patch embedding and a mean pool. XCiT keeps its own convolutional
stem (8 × 8 pixels a token, so it sees a larger image at the same number of tokens) and its two class-attention layers.
"""

import math
from dataclasses import dataclass
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, set_fused_attn, trunc_normal_
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import linvision  # noqa: F401  (registers the models)
from linvision.extras import needed
from linvision.nearest import nearest
from linvision.train.precision import DTYPES

SIZE = {'embed_dim': 192, 'depth': 12, 'num_heads': 3}  # timm's vit_tiny
PROJ_LEN = 256
PATCH = {'xcit': 8}  # pixels to a side of a token; 1 for all others
OURS = {  # name -> arguments beside those of the registered model
    'linvision': {},
    'linvision, whole': {'chunk_size': 0},
    'linvision, streamed': {'chunk_size': 8192},  # in training too
    'linvision, compiled': {},
    'linvision, linear E': {'projection': 'linear'},
    'linvision, K = 128': {'proj_len': 128},
    'linvision, CUDA graphs': {'chunk_size': 0},  # of a whole training step's kernels, which are then launched at once
}
OTHERS = ('ViT, fused', 'ViT, written out', 'linformer', 'linformer-pytorch', 'xcit')
GRAPHED = 'linvision, CUDA graphs'
CONTENDERS = tuple(name for name in (*OURS, *OTHERS) if name != GRAPHED)  # on every device


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        model: One of `CONTENDERS`.
        tokens: N, a square number.
        training: Forward and backward under autocast, instead of a forward pass in the precision itself.
        precision: A key of `DTYPES`.
        batch_size: Images.

    Raises:
        ValueError: `tokens` is no square number.
    """

    model: str
    tokens: int
    training: bool
    precision: str
    batch_size: int = 1

    def __post_init__(self) -> None:
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f'tokens must be a square number, for a square image, got {self.tokens:,}.')

    @property
    def img_size(self) -> int:
        """Side of the image in pixels."""
        return math.isqrt(self.tokens) * PATCH.get(self.model, 1)


class Package(nn.Module):
    """A transformer over tokens (B, N, D) between timm's patch embedding and a mean pool."""

    def __init__(self, img_size: int, encoder: nn.Module) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, 1, 3, SIZE['embed_dim'])
        self.pos_embed = nn.Parameter(torch.empty(1, img_size**2, SIZE['embed_dim']))
        if not self.pos_embed.is_meta:
            trunc_normal_(self.pos_embed, std=0.02)
        self.encoder = encoder
        self.norm, self.head = nn.LayerNorm(SIZE['embed_dim']), nn.Linear(SIZE['embed_dim'], 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) to logits (B, 1000)."""
        x = (self.patch_embed(x) + self.pos_embed).contiguous()  # (B, N, D); timm's patches are a transposed view
        return self.head(self.norm(self.encoder(x).mean(1)))


def build(case: Case) -> nn.Module:
    """The model of a case, in fp32 on torch's default device.

    Raises:
        MissingPackage: A package is not installed.
        ValueError: An unknown model.
    """
    D, depth, heads = SIZE.values()
    set_fused_attn(case.model != 'ViT, written out')  # timm's choice for all models that are made from here on
    if case.model in OURS:
        return timm.create_model(
            'linformer_vit_tiny_patch1_256', **{'img_size': case.img_size, 'proj_len': PROJ_LEN, **OURS[case.model]}
        )
    if case.model.startswith('ViT'):
        return timm.create_model(
            'vit_tiny_patch16_224', patch_size=1, img_size=case.img_size, class_token=False, global_pool='avg'
        )
    if case.model == 'xcit':
        return timm.create_model('xcit_tiny_12_p8_224', img_size=case.img_size)
    if case.model == 'linformer':
        with needed('this row'):
            from linformer import Linformer

        return Package(case.img_size, Linformer(D, case.tokens, depth, k=PROJ_LEN, heads=heads))
    if case.model == 'linformer-pytorch':
        with needed('this row'):
            from linformer_pytorch import Linformer

        encoder = Linformer(
            input_size=case.tokens, channels=D, dim_k=PROJ_LEN, dim_ff=4 * D, nhead=heads, depth=depth,
            dropout=0.0, dropout_ff=0.0, parameter_sharing='layerwise',
        )  # fmt: skip
        return Package(case.img_size, encoder)
    raise ValueError(nearest('model', case.model, CONTENDERS))


def multiply_adds(case: Case) -> int:
    """Multiply-adds of a forward pass over one image: torch's count on tensors without storage.

    Those that such tensors cannot run are counted as the one that multiplies the same.
    """
    same = {'ViT, written out': 'ViT, fused', 'linformer-pytorch': 'linformer', 'linvision, compiled': 'linvision'}
    model = same.get(case.model, case.model)
    with torch.device('meta'):
        net = build(Case(model, case.tokens, False, 'fp32')).eval()
        x = torch.empty(1, 3, case.img_size, case.img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops() // 2


def predicted_gib(case: Case) -> float:
    """A lower estimate of the memory above the model, from its largest arrays; to refuse what cannot fit.

    Attention written out holds scores and weights, H·N² each (the latter in every layer for the backward pass); the
    packages hold H·N·K once a layer; every model N·D twice, for the backward pass in every layer, unless it is ours,
    which may be recomputed instead.
    """
    D, depth, heads = SIZE.values()
    size = DTYPES[case.precision].itemsize
    layers = depth if case.training else 1
    numbers = case.tokens * D * 2 * (1 if case.model in OURS else layers)
    if case.model == 'ViT, written out':
        numbers += heads * case.tokens**2 * (layers + 1)
    elif case.model.startswith('linformer'):
        numbers += heads * case.tokens * PROJ_LEN * layers
    return case.batch_size * numbers * size / 2**30


def create_step(case: Case, device: torch.device):
    """A function that takes one step of a case: a forward pass, or forward and backward.

    Returns:
        The function, and the model's parameters (a number).
    """
    torch.manual_seed(0)
    model = build(case).to(device)
    x = torch.randn(case.batch_size, 3, case.img_size, case.img_size, device=device)
    labels = torch.zeros(case.batch_size, dtype=torch.long, device=device)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = DTYPES[case.precision]
    if case.model == 'linvision, compiled':
        model.set_compile('inductor')
    if not case.training:
        model, x = model.eval().to(dtype), x.to(dtype)

        @torch.inference_mode()
        def infer() -> Tensor:
            return model(x)

        return infer, parameters

    # a graph keeps its own casts of the weights, those that autocast keeps it would not see
    cast = partial(torch.autocast, device.type, dtype, case.precision != 'fp32', case.model != GRAPHED)
    if case.model == GRAPHED and device.type == 'cuda':
        with cast():
            model = torch.cuda.make_graphed_callables(model, (x,))

    def train() -> Tensor:
        model.zero_grad(set_to_none=True)
        with cast():
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        return loss.detach()

    return train, parameters
