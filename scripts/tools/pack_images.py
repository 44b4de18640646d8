"""A folder of small images as one file: their bytes one after another, for machines that take few files.

    python -m scripts.tools.pack_images --folder data/cifar10 --output outputs/cifar10.npz     # 60,000 JPEGs

The folder has `train/CLASS/` and `test/CLASS/`. `open_packed` gives a split as `create_dataset` gives one in memory.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from linvision.data import ImageSet
from linvision.guard import guarded

SPLITS = ('train', 'test')


def pack(folder: Path, output: Path) -> None:
    """Write a folder's images, sorted by class and name, as one compressed file of NumPy's."""
    classes = sorted(path.name for path in (folder / 'train').iterdir() if path.is_dir())
    parts, lengths, labels, counts = [], [], [], []
    for split in SPLITS:
        before = len(labels)
        for label, name in enumerate(classes):
            for path in sorted((folder / split / name).iterdir()):
                parts.append(path.read_bytes())
                lengths.append(len(parts[-1]))
                labels.append(label)
        counts.append(len(labels) - before)
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        output, bytes=np.frombuffer(b''.join(parts), np.uint8), lengths=np.array(lengths, np.uint32),
        labels=np.array(labels, np.uint8), counts=np.array(counts), classes=np.array(classes),
    )  # fmt: skip


def open_packed(path: Path, split: str) -> ImageSet:
    """A split of such a file, decoded."""
    with np.load(path, allow_pickle=False) as held:
        packed = {name: held[name] for name in held}
    first = 0 if split == 'train' else int(packed['counts'][0])
    index = slice(first, first + int(packed['counts'][SPLITS.index(split)]))
    ends = packed['lengths'].cumsum(dtype=np.int64)
    starts, data = ends - packed['lengths'], packed['bytes'].tobytes()
    images = [
        np.asarray(Image.open(io.BytesIO(data[start:end])).convert('RGB'))
        for start, end in zip(starts[index], ends[index], strict=True)
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # (n, C, H, W)
    labels = torch.from_numpy(packed['labels'][index].astype(np.int64))
    return ImageSet(pixels, labels, tuple(packed['classes'].tolist()), pixels.shape[-1], 'JPEG copy')


def main() -> None:
    """Pack the folder that the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, required=True)
    parser.add_argument('--output', type=Path, required=True)
    pack(**vars(parser.parse_args()))


if __name__ == '__main__':
    with guarded():
        main()
