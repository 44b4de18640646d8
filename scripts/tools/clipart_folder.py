"""A folder of real colour images in ten classes, to try `recipes/image_folder.py` on: Debian's Open Clip Art.

    python -m scripts.tools.clipart_folder --output-dir data/clipart

Clip art in the public domain, from the Debian package `openclipart-png` (131 MB, fetched with apt-get unless it is
installed). Each picture is drawn on white and fitted into 64×64 pixels. A class is a folder of the package, with at
most 600 pictures. Copies are left out, and so are giants; pictures whose names differ in a number only (`tree_01`,
`tree_02`) go to the same side of the split: one name in five to `val/`, by the SHA-256 of the name.
"""

import hashlib
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import tyro
from PIL import Image, ImageOps

from linvision.guard import end, guarded
from scripts.tools.debian import unpacked

PACKAGE = 'openclipart-png'
FOLDER = Path('usr/share/openclipart/png')
CLASSES = (
    'animals',
    'computer',
    'food',
    'geography',
    'office',
    'people',
    'recreation',
    'signs_and_symbols',
    'tools',
    'transportation',
)
SIDE, MOST, LARGEST = 64, 600, 4_000_000


def main(output_dir: Path = Path('data/clipart')) -> None:
    """Write the folder.

    Args:
        output_dir: Receives train/CLASS/NAME.png and val/CLASS/NAME.png; it must not exist yet.
    """
    if output_dir.exists():
        end(f'{output_dir} exists; remove it, or name another --output-dir.')
    installed = Path('/') / FOLDER
    try:
        with nullcontext(Path('/')) if installed.is_dir() else unpacked(PACKAGE) as root:
            part = output_dir.with_name(output_dir.name + '.part')
            shutil.rmtree(part, ignore_errors=True)
            counts = [write_class(root / FOLDER / name, part) for name in CLASSES]
            part.rename(output_dir)
    except (OSError, subprocess.SubprocessError) as error:
        end(f'{PACKAGE} could not be fetched ({error}). On Debian: apt-get install {PACKAGE}.')
    train, val = (sum(column) for column in zip(*counts, strict=True))
    print(f'{output_dir}: {len(CLASSES)} classes, {train:,} images in train/, {val:,} in val/')


def write_class(source: Path, target: Path) -> tuple[int, int]:
    """Write the pictures of one class; how many there are in train/ and val/."""
    pictures: dict[str, Path] = {}  # by content: copies are one
    for path in sorted(source.rglob('*.png')):
        if not path.is_symlink() and small(path):
            pictures.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    counts = {'train': 0, 'val': 0}
    for digest, path in sorted(pictures.items())[:MOST]:  # the order of digests is as good as chance
        name = re.sub(r'\d.*$', '', path.stem.lower()).strip('_-')
        split = 'val' if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0 else 'train'
        folder = target / split / source.name
        folder.mkdir(parents=True, exist_ok=True)
        draw(path).save(folder / f'{path.stem}_{digest[:8]}.png')
        counts[split] += 1
    return counts['train'], counts['val']


def small(path: Path) -> bool:
    """Whether a picture has at most `LARGEST` pixels, by its header."""
    with path.open('rb') as file:
        header = file.read(24)  # of a PNG: width and height at its end
    return int.from_bytes(header[16:20]) * int.from_bytes(header[20:24]) <= LARGEST


def draw(path: Path) -> Image.Image:
    """A picture on white, 64×64, RGB."""
    with Image.open(path) as image:
        drawn = image.convert('RGBA')
    white = Image.new('RGBA', drawn.size, 'white')
    white.alpha_composite(drawn)
    return ImageOps.pad(white.convert('RGB'), (SIDE, SIDE), Image.Resampling.LANCZOS, color='white')


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
