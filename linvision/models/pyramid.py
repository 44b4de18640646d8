"""Maps of chosen blocks at chosen reductions, for decoders that want coarser maps than tokens give.

A ViT has one resolution, its patch size, in every block: of a pixel model each map is as large as the image. Coarser
maps are means over squares of tokens, so that a reduction of 2 or 4 costs no weights and says the same.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn

from linvision.rules import POSITIVE


class FeaturePyramid(nn.Module):
    """What `timm.create_model(…, features_only=True, reductions=…)` gives: images to a list of maps.

    Args:
        model: The model; blocks after the last one that is needed are cut off.
        out_indices: A block for each map; a block may be named again, for another reduction.
        reductions: Pixels in a side of a map's cell, for each map; multiples of the patch size, not falling.
        norm: Apply the model's last norm to every map.

    Attributes:
        feature_info: timm's: channels and reduction of each map.

    Raises:
        ValueError: Reductions that the patch size does not divide, that fall, or as many as there are no blocks.
    """

    def __init__(self, model: Any, out_indices: int | Sequence[int], reductions: Sequence[int], norm: bool = False):
        super().__init__()
        depth, patch = len(model.blocks), model.patch_embed.patch_size
        blocks = range(depth - out_indices, depth) if isinstance(out_indices, int) else [i % depth for i in out_indices]
        reductions = list(reductions) if isinstance(reductions, Sequence) else [reductions]
        whole = all(POSITIVE.holds(r) and not any(r % side for side in patch) for r in reductions)
        if not whole or len(reductions) != len(blocks) or reductions != sorted(reductions):
            raise ValueError(
                f'reductions must be {len(blocks)} multiples of the patch size {tuple(patch)}, one for each of '
                f'out_indices and none below the one before, got {reductions}.'
            )
        info = [{**model.feature_info[i], 'reduction': r} for i, r in zip(blocks, reductions, strict=True)]
        self.feature_info = FeatureInfo(info, tuple(range(len(info))))
        self.blocks, self.norm = list(blocks), norm
        self.taken = sorted(set(blocks))
        self.cells = [(r // patch[0], r // patch[1]) for r in reductions]  # tokens
        model.prune_intermediate_layers(self.taken, prune_norm=not norm)
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to maps, (B, D, height / reduction, width / reduction), rounded up."""
        found = self.model.forward_intermediates(x, indices=self.taken, norm=self.norm, intermediates_only=True)
        maps = dict(zip(self.taken, found, strict=True))
        return [
            maps[i] if cell == (1, 1) else F.avg_pool2d(maps[i], cell, ceil_mode=True)
            for i, cell in zip(self.blocks, self.cells, strict=True)
        ]
