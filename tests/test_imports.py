"""No module of the package needs another that needs it, for types alone neither; heavy packages come where used."""

import ast
import json
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from runs import PROCESSES

from linvision.data import Augmentation, create_batches, create_dataset

ROOT = Path(__file__).parents[1]


def modules(root: Path, package: str) -> dict[str, Path]:
    """The files of a package by the name of their module."""
    names = {path: '.'.join(path.relative_to(root).with_suffix('').parts) for path in root.glob(f'{package}/**/*.py')}
    return {name.removesuffix('.__init__'): path for path, name in names.items()}


def imported(path: Path, known: set[str]) -> set[str]:
    """The known modules that a file imports outside its functions, under `if TYPE_CHECKING` too.

    `from package import name` is the module `package.name` where there is one. That a package's `__init__` runs before
    its modules is no import of theirs.
    """
    found, nodes = set(), list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path} has a relative import'
            whole = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= {name if name in known else node.module for name in whole}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found & known


def circle(root: Path, package: str) -> list[str]:
    """Modules each of which imports the next, and the last the first; empty where there are none."""
    known = modules(root, package)
    graph = {name: imported(path, set(known)) - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle():
    assert len(modules(ROOT, 'linvision')) > 50
    assert circle(ROOT, 'linvision') == []


@pytest.mark.parametrize(
    'line, found',
    [
        ('import package.a', True),
        ('from package import a', True),
        ('from package.a import A', True),
        ('from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.a import A', True),
        ('class B:\n    from package.a import A', True),
        ('def b():\n    from package.a import A', False),
        ('import other.a', False),
    ],
)
def test_a_circle_is_found(tmp_path, line, found):
    (tmp_path / 'package').mkdir()
    (tmp_path / 'package/__init__.py').write_text('from package.b import B')
    (tmp_path / 'package/a.py').write_text('from package.b import B')
    (tmp_path / 'package/b.py').write_text(line)
    assert bool(circle(tmp_path, 'package')) == found


def note_heavy(file: Path) -> None:
    """Which heavy packages are there once `linvision.train` is, and which are once images come; in a new process."""
    heavy = {'kornia', 'albumentations', 'cv2', 'matplotlib', 'webdataset'}
    lines = [sorted(heavy & set(sys.modules))]
    images = create_dataset('fake', '', 'train')
    for library in ('torchvision', 'torch', 'kornia'):
        augmentation = Augmentation(library, hflip=0.5)
        next(create_batches(images, 8, (0.5,), (0.5,), torch.device('cpu'), augmentation).stream(0, 0, 16))
        lines.append(sorted(heavy & set(sys.modules)))
    file.write_text(json.dumps(lines))


def test_packages_are_imported_where_they_are_used(tmp_path):
    process = PROCESSES.Process(target=note_heavy, args=(tmp_path / 'found',))
    process.start()
    process.join()
    assert json.loads((tmp_path / 'found').read_text()) == [[], [], [], ['kornia']]
