"""Pathfinder at 256×256 pixels, 65,536 tokens, from the weights of half the size.

    linvision train pathfinder_65k --init outputs/pathfinder_16k --output-dir outputs/pathfinder_65k

Projection and positions are resized to the larger grid; `--init ''` starts from scratch. Or with masked pixels first:

    linvision train pathfinder_65k --init '' --task masked_pixels --output-dir outputs/pathfinder_65k_pixels
    linvision train pathfinder_65k --init outputs/pathfinder_65k_pixels

Path-256: block-sparse attention without self-pretraining has 63.1
(FlashAttention, arXiv 2205.14135).

Result: not yet run beyond one step of one image, 171 s and 1.56 GiB on one busy CPU thread (docs/pathfinder.md), nor on
a GPU.
"""

from pathlib import Path

from linvision.train import main
from pathfinder_16k import RECIPE as PATHFINDER_16K

RECIPE = PATHFINDER_16K.replace(
    model='linformer_vit_tiny_patch1_256',
    init='outputs/pathfinder_16k',
    dataset_args={**PATHFINDER_16K.data.dataset_args, 'img_size': 256},
    output_dir=Path('outputs/pathfinder_65k'),
    epochs=10,
    batch_size=32,
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
