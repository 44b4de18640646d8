"""A stand-in for ImageNet: made-up JPEGs in 1,000 WordNet-id folders, and the same images as WebDataset shards.

    python -m scripts.tools.imagenet_layout --output-dir data/imagenet_layout

2,000 images in `train/`, 1,000 in `val/`, 500×375 pixels and about 65 kB each, not far from ImageNet's: enough to try a
recipe's reading, its speed and its errors on. `shards/` holds both splits in tar files with an `_info.json`, as timm's
`wds/` reader wants them. Nothing can be learnt from them.
"""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from timm.data import ImageNetInfo

from linvision.guard import guarded

SIZE = (500, 375)
SPLITS = {'train': 2, 'val': 1}  # images of each class
SHARDS = {'train': 8, 'val': 2}


def jpeg(seed: int) -> bytes:
    """A JPEG of random blobs with some noise, whose size is that of a photograph."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(np.int16) + draw.integers(-24, 25, (SIZE[1], SIZE[0], 3), dtype=np.int16)
    file = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=85)
    return file.getvalue()


def write_shards(folder: Path, split: str, images: list[tuple[str, int, bytes]]) -> dict[str, object]:
    """Write one split as shards; its entry in `_info.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    names, lengths = [], []
    for shard in range(SHARDS[split]):
        part = images[shard :: SHARDS[split]]
        names.append(f'imagenet-{split}-{shard:04d}.tar')
        lengths.append(len(part))
        with tarfile.open(folder / names[-1], 'w') as tar:
            for name, label, data in part:
                for suffix, content in (('jpg', data), ('cls', str(label).encode())):
                    entry = tarfile.TarInfo(f'{name}.{suffix}')
                    entry.size = len(content)
                    tar.addfile(entry, BytesIO(content))
    return {'name': split, 'num_samples': len(images), 'filenames': names, 'shard_lengths': lengths}


def main(output_dir: Path = Path('data/imagenet_layout')) -> None:
    """Write the folder.

    Args:
        output_dir: Receives train/, val/ and shards/.
    """
    classes, info = ImageNetInfo().label_names(), {}
    for split, count in SPLITS.items():
        images = []
        for label, wnid in enumerate(classes):
            folder = output_dir / split / wnid
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                data = jpeg(10 * label + i + (5 if split == 'val' else 0))
                (folder / f'{wnid}_{i}.JPEG').write_bytes(data)
                images.append((f'{wnid}_{i}', label, data))
        info[split] = write_shards(output_dir / 'shards', split, images)
    (output_dir / 'shards' / '_info.json').write_text(json.dumps({'name': 'imagenet', 'splits': info}, indent=2))
    counts = ', '.join(f'{n * len(classes):,} in {split}/' for split, n in SPLITS.items())
    print(f'{output_dir}: {len(classes):,} classes, {counts}')


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
