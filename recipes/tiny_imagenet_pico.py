"""Tiny ImageNet, 200 classes, in patches of 2×2 pixels: 64×64 images, 1,024 tokens, a model of 0.2 M parameters.

    linvision train tiny_imagenet_pico --output-dir outputs/tiny_imagenet_pico --data-dir data

Result: 37.79 % on all 10,000 validation images, one seed (92 minutes on one thread of a Zen 3, with other jobs beside
it: 482,112 images, 4.8 epochs, fp32, torch 2.14.1, 2026-11-30; metrics beside the weights in the package, log in
scripts/studies/results/). Not yet run on a GPU.

The set is decoded once and lives on the device as uint8 (1.2 GB); kornia changes it there. Coarse to fine, by the
clock: three fifths of the time on images of 16×16 and 32×32 pixels. Every pixel a token:
`--model linformer_vit_pico_patch1_64` (4,096 tokens).
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_pico_patch2_64',
    model_args={'local_grid': 16},  # taps of the local path: neighbours at 16×16 and 32×32 pixels, two apart at 64×64
    data=Data(dataset='tiny_imagenet', stages=((16, 0.15), (32, 0.45), (48, 0.15), (64, 0.25)), batch_size=64),
    optim=Optim(opt='muon', lr=0.014, smoothing=0.0),
    augment=Augment(augmentation='kornia', hflip=0.5, shift=4),
    run=Run(output_dir=Path('outputs/tiny_imagenet_pico'), max_minutes=92.0, threads=1),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
