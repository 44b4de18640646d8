"""A plain ViT on Fashion-MNIST, with patches of 2 pixels: 256 tokens and full attention, to convert and to learn from.

    linvision train fashion_mnist_vit --output-dir outputs/vit --data-dir data

timm's `VisionTransformer`, as wide and as deep as the pico models, with learned positions and the mean of all tokens
for a head: nothing in it is linvision's. Trained as the pixels are, coarse to fine, 64 tokens first, in batches of 64.

Result: 89.04 % on all 10,000 test images after `--epochs 8` on 95 % of the training images (`python -m
scripts.studies.run conversion`, one thread of a Zen 3, fp32, torch 2.14.1, 2026-11-25). Not yet run on a GPU.
"""

from pathlib import Path

from fashion_mnist_pixels import RECIPE as FASHION_MNIST_PIXELS
from linvision.train import main

RECIPE = FASHION_MNIST_PIXELS.replace(
    model='vit_tiny_patch16_224',
    model_args={
        'patch_size': 2,
        'embed_dim': 64,
        'depth': 4,
        'num_heads': 2,
        'class_token': False,
        'global_pool': 'avg',
    },
    output_dir=Path('outputs/vit'),
    epochs=6,
    batch_size=64,
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
