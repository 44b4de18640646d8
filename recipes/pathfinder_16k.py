"""Pathfinder at 128×128 pixels, 16,384 tokens, from the weights of half the size.

    linvision train pathfinder_16k --init outputs/pathfinder_4k --output-dir outputs/pathfinder_16k

Projection and positions are resized to the larger grid; `--init ''` starts from scratch. Or with masked pixels first:

    linvision train pathfinder_16k --init '' --task masked_pixels --output-dir outputs/pathfinder_16k_pixels
    linvision train pathfinder_16k --init outputs/pathfinder_16k_pixels

LRA's Path-X, where its models fail; attention without self-pretraining has 61.4
(FlashAttention, arXiv 2205.14135).

Result: not yet run.
"""

from pathlib import Path

from linvision.train import main
from pathfinder_4k import RECIPE as PATHFINDER_4K

RECIPE = PATHFINDER_4K.replace(
    model='linformer_vit_tiny_patch1_128',
    init='outputs/pathfinder_4k',
    dataset_args={**PATHFINDER_4K.data.dataset_args, 'img_size': 128},
    output_dir=Path('outputs/pathfinder_16k'),
    epochs=20,
    batch_size=64,
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
