"""Images that were made once, kept on disk as one array; any number of processes may fill it."""

import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np


class ImageCache:
    """A uint8 array of images in a file, filled as they are asked for.

    An image that was being written when a process died is made again: its mark is set after it.

    Args:
        folder: Where the files lie; they are sparse until they are full.
        count: Images.
        shape: Of one.

    Raises:
        ValueError: The folder holds an array of another shape.
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, ...]) -> None:
        self.folder, self.count, self.shape = folder, count, shape
        folder.mkdir(parents=True, exist_ok=True)
        for name, size in {'images.npy': (count, *shape), 'made.npy': (count,)}.items():
            if not (folder / name).exists():
                create(folder / name, size)
        if self.images.shape != (count, *shape):
            raise ValueError(
                f'{folder} holds {len(self.images):,} images and {count:,} are asked for: remove the folder, or ask '
                'for as many.'
            )

    @cached_property
    def images(self) -> np.memmap:
        """The images."""
        return np.lib.format.open_memmap(self.folder / 'images.npy', mode='r+')

    @cached_property
    def made(self) -> np.memmap:
        """Which of them are there."""
        return np.lib.format.open_memmap(self.folder / 'made.npy', mode='r+')

    def __getstate__(self) -> dict[str, object]:
        """Another process opens the files itself."""
        return {'folder': self.folder, 'count': self.count, 'shape': self.shape}

    def get(self, index: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An image, made if it is not there."""
        if not self.made[index]:
            self.images[index] = make()
            self.made[index] = 1
        return np.array(self.images[index])


def create(path: Path, shape: tuple[int, ...]) -> None:
    """A file of zeros that appears whole, or not where another process was faster."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    os.close(handle)
    try:
        np.lib.format.open_memmap(part, mode='w+', dtype=np.uint8, shape=shape)
        os.chmod(part, 0o644)
        os.link(part, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(part)
