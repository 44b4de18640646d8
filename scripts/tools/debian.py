"""Data that Debian ships in a package, unpacked without root.

    python -m scripts.tools.debian dataset-fashion-mnist usr/share/datasets/fashion-mnist data/FashionMNIST/raw

fetches a package with `apt-get download`, and copies the files of one of its folders. Nothing is installed.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linvision.guard import end, guarded


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


def main(package: str, source: str, target: str) -> None:
    """Copy a folder of a package.

    Args:
        package: Name of the package.
        source: Folder in it, from the root.
        target: Folder that receives its files.
    """
    try:
        with unpacked(package) as root:
            shutil.copytree(root / source, target, dirs_exist_ok=True)
    except (OSError, subprocess.SubprocessError) as error:
        end(f'{package} could not be fetched ({error}). As root: apt-get install {package}.')


if __name__ == '__main__':
    with guarded():
        if len(sys.argv) != 4:
            raise ValueError('Expected a package, a folder in it and a folder that receives it: PACKAGE SOURCE TARGET.')
        main(*sys.argv[1:])
