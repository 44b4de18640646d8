"""Files of small images, decoded once and kept as one array, so that the set lives in memory or on the device.

Of the images of a folder's `train/`, `FOLDER/.decoded/` holds three files, `train-DIGEST.*`: `images.npy` (n, C, H, W),
uint8; `labels.npy` (n), int64; and, written last, `facts.json`. The digest is of the files' names, sizes and times, so
that a changed folder is decoded again. Each file appears under its name when it is whole. `image_cache.py`, which many
processes fill image by image, is for images that are made; here nothing is used before all of it is there.
"""

import hashlib
import json
import logging
import math
import os
import stat
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from linvision.data.folders import ImageFiles, none_readable
from linvision.data.image_set import ImageSet
from linvision.data.loader_batches import available_cpus, ignore_signals, leaving
from linvision.installed_memory import installed_gib

PLACE = '.decoded'  # hidden, so that it is no class of an image folder
FORMAT = 1  # of what is kept, and of how an image is read
BLOCK = 256  # images that a worker decodes at a time
FEW = 4 * BLOCK  # images that are decoded before a worker would have started
WORKERS = 8  # at most
SHARE = 0.5  # of the machine's memory that a set may take
STALE_HOURS = 1.0  # after which a part of a file is of a process that died

Decoded = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # images, labels, and what could not be read

_logger = logging.getLogger(__name__)


def decoded(
    files: ImageFiles, folder: Path, split: str, img_size: int, keep: bool, note: str = ''
) -> ImageSet | ImageFiles:
    """A set of files as one in memory: what is kept of an earlier start, else decoded, and kept.

    What cannot be read is not in the set, but in its `unreadable`. Where `folder` cannot be written, the images are
    kept in the system's folder for temporary files.

    Args:
        files: The files of one split.
        folder: The folder that holds them; receives `.decoded`.
        split: Name of the split.
        img_size: Side of all images.
        keep: Write what was decoded.
        note: See `ImageSet`.

    Returns:
        The set; the files themselves where they are more than half of the machine's memory holds, with a warning.

    Raises:
        OSError: No image can be read.
        ValueError: An image has another size.
    """
    names, shape = files.names, (files.in_chans, img_size, img_size)
    gib = len(files) * math.prod(shape) / 2**30
    if gib > SHARE * installed_gib():
        _logger.warning(f'{len(files):,} images of {folder} are {gib:.1f} GiB, and not held in memory')
        return files
    digest = fingerprint(files, names, img_size)
    stem, places = f'{split}-{digest[:16]}', [folder / PLACE, temporary_place(folder)]
    for place in places:
        if found := kept(place, stem, digest, len(files), shape, len(files.classes)):
            images, labels, unreadable = found
            break
    else:
        changed = any(not path.name.startswith(stem) for path in (folder / PLACE).glob(f'{split}-*.json'))
        again = ' again, since they have changed' if changed else ', once' if keep else ''
        _logger.warning(f'{len(files):,} images of {folder} are decoded{again}')
        images, labels, unreadable = decode(files, img_size)
        if keep:
            keep_somewhere(places, stem, {'fingerprint': digest, 'unreadable': unreadable}, images, labels)
    tensors = torch.from_numpy(images), torch.from_numpy(labels)
    return ImageSet(*tensors, files.classes, img_size, note, unreadable, digest_of(names))


def digest_of(words: list[str]) -> str:
    """SHA-256 of lines."""
    return hashlib.sha256(os.fsencode('\n'.join(words))).hexdigest()


def fingerprint(files: ImageFiles, names: list[str], img_size: int) -> str:
    """What tells these images from others: name, label, size and time of each file, and how they are read."""
    lines = [f'{FORMAT} {files.in_chans} {img_size}']
    for name, (path, label) in zip(names, files.samples, strict=True):
        try:
            found = os.stat(path)
            lines.append(f'{name}\t{label}\t{found.st_size}\t{found.st_mtime_ns}')
        except OSError:  # it vanished since, which decoding will say
            lines.append(f'{name}\t{label}')
    return digest_of(lines)


# -------------------------------------------------------------------------------------------------------- decoding


class Blocks(Dataset):
    """Files, some at a time: images (B, C, size, size), what could not be read, and what has another size, in words.

    Args:
        files: The files.
        size: Side of the images.
    """

    def __init__(self, files: ImageFiles, size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return -(-len(self.files) // BLOCK)

    def __getitem__(self, number: int) -> tuple[Tensor, list[str], str]:
        start, size = number * BLOCK, self.size
        count = min(BLOCK, len(self.files) - start)
        pixels = np.zeros((count, size, size, self.files.in_chans), np.uint8)
        complaints, odd = [''] * count, ''
        for i in range(count):
            try:
                image, _ = self.files[start + i]
            except OSError as error:
                complaints[i] = str(error)
                continue
            if image.size == (size, size):
                pixels[i] = np.asarray(image).reshape(size, size, -1)
            else:
                odd = odd or f'{self.files.samples[start + i][0]} has {image.width}×{image.height}'
        return (
            torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            complaints,
            odd,
        )  # (B, H, W, C) -> (B, C, H, W)


def decode(files: ImageFiles, size: int) -> Decoded:
    """Images (n, C, size, size) and labels (n) of the files that can be read, and of the others why not.

    Raises:
        OSError: No image can be read.
        ValueError: An image has another size.
    """
    from tqdm import tqdm  # which comes with timm, by huggingface_hub

    workers = 0 if len(files) <= FEW else min(WORKERS, available_cpus())
    init: Callable[[int], None] | None = partial(ignore_signals, leaving()) if workers else None
    loader = DataLoader(Blocks(files, size), batch_size=None, num_workers=workers, worker_init_fn=init)
    images = np.empty((len(files), files.in_chans, size, size), np.uint8)
    complaints: list[str] = []
    with tqdm(total=len(files), unit=' images', disable=None, leave=False) as bar:  # on a terminal alone
        for pixels, said, odd in loader:
            if odd:
                raise ValueError(
                    f'{odd} pixels, and this set has {size}×{size} throughout. For images of other sizes say --dataset '
                    'image_folder.'
                )
            images[len(complaints) : len(complaints) + len(said)] = pixels.numpy()
            complaints += said
            bar.update(len(said))
    labels = np.array([label for _, label in files.samples], np.int64)
    readable = [not complaint for complaint in complaints]
    if not any(readable):
        raise OSError(none_readable(files.samples[0][0]))
    if not all(readable):
        images, labels = images[readable], labels[readable]
    return images, labels, tuple(filter(None, complaints))


# --------------------------------------------------------------------------------------------------------- keeping


def temporary_place(folder: Path) -> Path:
    """Where a folder's decoded images are kept if not beside it: this user's own, and the folder's own in that."""
    return Path(tempfile.gettempdir(), f'linvision-{os.getuid()}', digest_of([str(folder.resolve())])[:16])


def is_ours(place: Path) -> bool:
    """Whether a place is the data folder's, or a temporary one that is not another user's."""
    if place.name == PLACE:
        return True
    found = place.parent.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def kept(place: Path, stem: str, digest: str, count: int, shape: tuple[int, ...], classes: int) -> Decoded | None:
    """Images (mapped from the file), labels and what could not be read, as `keep_in` wrote them; None if they are not.

    Args:
        place: The folder.
        stem: Begin of the files' names.
        digest: The fingerprint.
        count: Files that there are.
        shape: Of an image.
        classes: How many there are.
    """
    mark = place / f'{stem}.facts.json'
    try:
        if not mark.is_file() or not is_ours(place):
            return None
        facts: dict[str, Any] = json.loads(mark.read_text())
        unreadable = tuple(map(str, facts['unreadable']))
        # mode c: a change stays in this process
        images = np.lib.format.open_memmap(place / f'{stem}.images.npy', mode='c')
        labels = np.array(np.lib.format.open_memmap(place / f'{stem}.labels.npy', mode='r'))
        n = count - len(unreadable)
        if facts['fingerprint'] != digest or (images.shape, images.dtype) != ((n, *shape), np.uint8):
            raise ValueError('other images')
        if (labels.shape, labels.dtype) != ((n,), np.int64) or labels.min() < 0 or labels.max() >= classes:
            raise ValueError('other labels')
    except (OSError, ValueError, KeyError, TypeError) as error:
        _logger.warning(f'{place}/{stem}.* is cut or not ours ({error}), and made again')
        return None
    return images, labels, unreadable


def keep_somewhere(
    places: list[Path], stem: str, facts: dict[str, Any], images: np.ndarray, labels: np.ndarray
) -> None:
    """Keep a decoded set in the first of the places that can be written; say where, if it is not the first."""
    failures: list[str] = []
    for place in places:
        try:
            if place.name != PLACE:
                place.parent.mkdir(mode=0o700, exist_ok=True)
            if not is_ours(place):
                raise OSError(f'{place.parent} belongs to another user')
            keep_in(place, stem, facts, images, labels)
        except OSError as error:
            failures.append(f'{place} cannot be written ({error})')
            continue
        if failures:
            _logger.warning(f'{failures[0]}: the decoded images are in {place}')
        return
    _logger.warning(f'{"; ".join(failures)}: the images are decoded again at every start')


def keep_in(place: Path, stem: str, facts: dict[str, Any], images: np.ndarray, labels: np.ndarray) -> None:
    """Keep a decoded set in a folder, in place of an earlier one of the same split.

    Raises:
        OSError: The folder cannot be written; nothing is left in it.
    """
    place.mkdir(parents=True, exist_ok=True)
    for path in place.glob('*.part'):
        if time.time() - path.stat().st_mtime > 3600 * STALE_HOURS:
            path.unlink(missing_ok=True)
    text = json.dumps(facts, indent=2) + '\n'
    write(place / f'{stem}.images.npy', lambda file: np.save(file, images))
    write(place / f'{stem}.labels.npy', lambda file: np.save(file, labels))
    write(place / f'{stem}.facts.json', lambda file: file.write(text.encode()))
    for path in place.glob(f'{stem.split("-")[0]}-*'):
        if not path.name.startswith(stem) and path.suffix != '.part':
            path.unlink(missing_ok=True)


def write(path: Path, content: Callable[[Any], Any]) -> None:
    """A file that appears under its name when it is whole and on the disk."""
    handle, part = tempfile.mkstemp('.part', path.name, path.parent)  # another process may write the same
    try:
        with os.fdopen(handle, 'wb') as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
