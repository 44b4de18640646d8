"""scikit-learn's digits as a folder of images: 1,797 grey 8×8 pictures in ten classes, to fine-tune a backbone on.

    pip install 'linvision[digits]'
    python -m scripts.tools.digits_folder --output-dir data/digits

From the test part of the UCI set of handwritten digits (Alpaydin and Kaynak 1998, CC BY 4.0). Every fifth image of a
class goes to `val/`.
"""

from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from linvision.extras import needed
from linvision.guard import end, guarded


def main(output_dir: Path = Path('data/digits')) -> None:
    """Write the folder.

    Args:
        output_dir: Receives train/CLASS/NUMBER.png and val/CLASS/NUMBER.png; it must not exist yet.
    """
    if output_dir.exists():
        end(f'{output_dir} exists; remove it, or name another --output-dir.')
    with needed('digits_folder'):
        from sklearn.datasets import load_digits
    digits = load_digits()
    seen = [0] * 10
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = 'val' if seen[label] % 5 == 4 else 'train'
        seen[label] += 1
        file = output_dir / split / str(label) / f'{i:04d}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(file)  # 0 to 16 in the set
    print(f'{len(digits.target):,} images in {output_dir}')


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
