"""CIFAR-10, pixel by pixel: 1,024 tokens.

    linvision train cifar10_pixels --output-dir outputs/cifar10_pixels --data-dir data
    torchrun --nproc-per-node 8 -m linvision train cifar10_pixels --output-dir outputs/cifar10_pixels --data-dir data

Result: not yet run. To compare with: 96.5 % of CCT-7/3x1 after 300 epochs (SHI-Labs/Compact-Transformers).

The set lives on the device as uint8, and is changed there in batches. Coarse to fine: half of the steps on 16×16 images
(256 tokens).
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_tiny_patch1_32',
    data=Data(dataset='cifar10', stages=((16, 0.5), (32, 0.5)), batch_size=256, val_fraction=0.02),
    optim=Optim(opt='muon', lr=0.01, smoothing=0.1),
    augment=Augment(augmentation='torch', hflip=0.5, shift=4, erase=0.25, cutmix=1.0),
    run=Run(output_dir=Path('outputs/cifar10_pixels'), epochs=300, eval_every=5, checkpoint_every=1000),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
