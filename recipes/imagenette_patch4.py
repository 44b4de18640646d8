"""Imagenette in patches of 4×4 pixels: 224×224 images, 3,136 tokens.

    linvision train imagenette_patch4 --output-dir outputs/imagenette_patch4 --data-dir data

Result: not yet run.

albumentations crops and colours in worker processes. Coarse to fine: half of the steps on 112×112 images (784 tokens).
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_tiny_patch4_224',
    data=Data(dataset='imagenette', stages=((112, 0.5), (224, 0.5)), batch_size=128, val_fraction=0.02, workers=8),
    optim=Optim(opt='muon', lr=0.01, smoothing=0.1),
    augment=Augment(augmentation='albumentations', crop_scale=(0.35, 1.0), hflip=0.5, color_jitter=0.3, erase=0.25),
    run=Run(output_dir=Path('outputs/imagenette_patch4'), epochs=100, eval_every=5),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
