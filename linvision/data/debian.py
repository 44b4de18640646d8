"""Data that Debian ships in a package, unpacked without root."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unpacked(package: str) -> Iterator[Path]:
    """A temporary folder that stands for `/`, with the files of a package in it.

    Args:
        package: Name of the package.

    Raises:
        OSError: There is no apt-get or dpkg-deb here.
        subprocess.SubprocessError: The package could not be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(['apt-get', 'download', package], cwd=folder, check=True, capture_output=True, timeout=300)
        archive = next(Path(folder).glob('*.deb'))
        subprocess.run(['dpkg-deb', '-x', str(archive), folder], check=True, capture_output=True, timeout=300)
        yield Path(folder)
