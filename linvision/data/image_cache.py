"""Images that were made once, kept on disk as one array; any number of processes of one machine may fill it."""

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
        folder: Where the files lie; they are made with the first image, and sparse until they are full.
        count: Images.
        shape: Of one.
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, ...]) -> None:
        self.folder, self.count, self.shape = folder, count, shape

    def open_array(self, name: str, *shape: int) -> np.memmap:
        """One of the arrays.

        Raises:
            ValueError: The file holds an array of another shape.
        """
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            create(path, shape)
        found = np.lib.format.open_memmap(path, mode='r+')
        if found.shape != shape:
            raise ValueError(f'{path} holds an array {found.shape}, and {shape} is asked for: remove it.')
        return found

    @cached_property
    def images(self) -> np.memmap:
        """The images."""
        return self.open_array('images.npy', self.count, *self.shape)

    @cached_property
    def made(self) -> np.memmap:
        """Which of them are there."""
        return self.open_array('made.npy', self.count)

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
    np.lib.format.open_memmap(part, mode='w+', dtype=np.uint8, shape=shape)
    os.chmod(part, 0o644)
    try:
        os.link(part, path)  # fails where the file is there, unlike a renaming
    except FileExistsError:
        pass
    except OSError:  # no hard links on this file system
        os.replace(part, path)
        return
    os.unlink(part)
