"""Fashion-MNIST, pixel by pixel: 28×28 images on a 32×32 canvas, 1,024 tokens.

    linvision train fashion_mnist_pixels --output-dir outputs/fashion_mnist_pixels --data-dir data

Result: 93.39 % on all 10,000 test images, one seed (24 epochs, 1,440,000 images, `--threads 1 --precision bf16`: 152
minutes on one thread of a Zen 5 with other jobs beside it, torch 2.14.1, 2026-11-24; metrics beside the weights in the
package, log in scripts/studies/results/). By the clock, `bash scripts/demo.sh` gave 89.50 % (11 minutes, two threads).
Not yet run on a GPU.

Coarse to fine: three quarters of the steps, and less than half of the time, on 16×16 images (256 tokens), the rest on
32×32. (In the run of 93.39 % convolutions spanned three pixels at both sizes: `--model-args local_grid 32`. Now they
keep the span of the first.)
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_pico_patch1_32',
    data=Data(dataset='fashion_mnist', stages=((16, 0.75), (32, 0.25)), batch_size=32),
    optim=Optim(opt='muon', lr=0.01),
    augment=Augment(augmentation='kornia', hflip=0.5),
    run=Run(output_dir=Path('outputs/fashion_mnist_pixels'), epochs=24),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
