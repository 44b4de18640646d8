"""ImageNet-1k, pixel by pixel: 50,176 tokens, coarse to fine from 112×112 (12,544 tokens) to 224×224.

    torchrun --nproc-per-node 8 -m linvision train imagenet_pixels --data-dir /data/imagenet

Result: not yet run. To compare with: 84.6 % of Adventurer-B at 50,176 tokens (wangf3014/Patch_Scaling).
"""

from pathlib import Path

from imagenet_patch16 import RECIPE as PATCH16
from linvision.train import main

RECIPE = PATCH16.replace(
    model='linformer_vit_tiny_patch1_224',
    model_args={},
    output_dir=Path('outputs/imagenet_pixels'),
    stages=((112, 0.85), (224, 0.15)),
    batch_size=512,
    accumulate=4,
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
