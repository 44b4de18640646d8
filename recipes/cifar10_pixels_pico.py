"""CIFAR-10, pixel by pixel, for a laptop: 1,024 tokens, and a model of 0.2 M parameters.

    linvision train cifar10_pixels_pico --data-dir data

Result: 83.94 % on all 10,000 test images of the JPEG copy, one seed (110 minutes on one thread of a Xeon with AMX, with
other jobs beside it: 1,736,256 images, 34.7 epochs, bf16, torch 2.14.1, 2026-12-01; metrics beside the weights in the
package, log in scripts/studies/results/). A processor without bf16 sees a third of the images in the time, or less: one
run of 105 minutes on a Zen 3 ended at 80.77 %. Not yet run on a GPU. To compare with: 89.2 % of CCT-2/3x2 with 0.28 M
parameters after 200 epochs (SHI-Labs/Compact-Transformers).

CIFAR-10 may also lie in `data/cifar10/train/CLASS` and `test/CLASS` as image files; what is scored on such a copy says
so. Coarse to fine, by the clock: half of the time on images of 8×8 and 16×16 pixels.
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_pico_patch1_32',
    model_args={'local_grid': 16},  # taps of the local path: neighbours at 8×8 and 16×16, two apart at 32×32
    data=Data(dataset='cifar10', stages=((8, 0.1), (16, 0.4), (24, 0.2), (32, 0.3)), batch_size=64),
    optim=Optim(opt='muon', lr=0.014, smoothing=0.0),
    augment=Augment(augmentation='kornia', hflip=0.5, shift=2),
    run=Run(output_dir=Path('outputs/cifar10_pixels_pico'), max_minutes=110.0, threads=1),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
