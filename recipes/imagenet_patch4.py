"""ImageNet-1k in patches of 4×4 pixels: 3,136 tokens.

    torchrun --nproc-per-node 8 -m linvision train imagenet_patch4 --data-dir /data/imagenet

Result: not yet run. `imagenet_patch16` with sixteen times the tokens; coarse to fine, three quarters of the steps on
112×112 images (784 tokens).
"""

from pathlib import Path

from imagenet_patch16 import RECIPE as PATCH16
from linvision.train import main

RECIPE = PATCH16.replace(
    model='linformer_vit_small_patch4_224',
    model_args={},
    output_dir=Path('outputs/imagenet_patch4'),
    stages=((112, 0.75), (224, 0.25)),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
