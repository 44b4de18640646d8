"""CIFAR-100, pixel by pixel: 1,024 tokens.

    linvision train cifar100_pixels --output-dir outputs/cifar100_pixels --data-dir data

Result: not yet run. To compare with: 85.1 % of a pixel ViT-T (ViT-T/2: 83.6 %; arXiv 2406.09415). `cifar10_pixels` on
other classes.
"""

from pathlib import Path

from cifar10_pixels import RECIPE as CIFAR10
from linvision.train import main

RECIPE = CIFAR10.replace(dataset='cifar100', output_dir=Path('outputs/cifar100_pixels'))

if __name__ == '__main__':
    main(RECIPE, __doc__)
