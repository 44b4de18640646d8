"""A plain ViT on Fashion-MNIST, with patches of 2 pixels: 256 tokens and full attention, to convert and to learn from.

    python recipes/fashion_mnist_vit.py --output-dir outputs/vit --data-dir data

timm's `VisionTransformer`, as wide and as deep as the pico models, with learned positions and the mean of all tokens
for a head; nothing in it is linvision's. Coarse to fine, as `fashion_mnist_pixels.py`.

Not yet run in earnest. Not yet run on a GPU.
"""

from pathlib import Path

from linvision.train import Recipe, main

RECIPE = Recipe(
    model='vit_tiny_patch16_224',
    model_args={
        'patch_size': 2,
        'embed_dim': 64,
        'depth': 4,
        'num_heads': 2,
        'class_token': False,
        'global_pool': 'avg',
    },
    dataset='fashion_mnist',
    output_dir=Path('outputs/vit'),
    epochs=6,
    stages=((16, 0.75), (32, 0.25)),
    batch_size=64,
    opt='muon',
    lr=0.01,
    augmentation='kornia',
    hflip=0.5,
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
