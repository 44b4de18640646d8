"""CIFAR-10 in patches of 2×2 pixels: 256 tokens, what four times fewer tokens cost or gain.

    linvision train cifar10_patch2 --output-dir outputs/cifar10_patch2 --data-dir data

Result: not yet run. `cifar10_pixels` with another model; all at 32×32.
"""

from pathlib import Path

from cifar10_pixels import RECIPE as PIXELS
from linvision.train import main

RECIPE = PIXELS.replace(
    model='linformer_vit_tiny_patch2_32',
    output_dir=Path('outputs/cifar10_patch2'),
    stages=(),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
