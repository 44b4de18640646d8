"""Pathfinder at 64×64 pixels, 4,096 tokens, from the weights of half the size.

    linvision train pathfinder_4k --init outputs/pathfinder_1k --output-dir outputs/pathfinder_4k

Projection and positions are resized to the larger grid; `--init ''` starts from scratch. Or with masked pixels first:

    linvision train pathfinder_4k --init '' --task masked_pixels --output-dir outputs/pathfinder_4k_pixels
    linvision train pathfinder_4k --init outputs/pathfinder_4k_pixels

There is no figure of LRA for this size.

Result: not yet run.
"""

from pathlib import Path

from linvision.train import main
from pathfinder_1k import RECIPE as PATHFINDER_1K

RECIPE = PATHFINDER_1K.replace(
    model='linformer_vit_tiny_patch1_64',
    init='outputs/pathfinder_1k',
    dataset_args={**PATHFINDER_1K.data.dataset_args, 'img_size': 64},
    output_dir=Path('outputs/pathfinder_4k'),
    epochs=30,
    batch_size=128,
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
