"""CIFAR-10, pixel by pixel, for a laptop: 1,024 tokens, and a model of 0.2 M parameters.

    linvision train cifar10_pixels_pico --output-dir outputs/cifar10_pixels_pico --data-dir data

Result: not yet run. To compare with: 89.2 % of CCT-2/3x2 with 0.28 M parameters after 200 epochs
(SHI-Labs/Compact-Transformers).

CIFAR-10 may also lie in `data/cifar10/train/CLASS` and `test/CLASS` as image files; what is scored on such a copy says
so. Coarse to fine: 70 % of the steps on 16×16 images (256 tokens).
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_pico_patch1_32',
    data=Data(dataset='cifar10', stages=((16, 0.7), (32, 0.3)), batch_size=32),
    optim=Optim(opt='muon', lr=0.01, smoothing=0.0),
    augment=Augment(augmentation='kornia', hflip=0.5, shift=2),
    run=Run(output_dir=Path('outputs/cifar10_pixels_pico'), epochs=20),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
