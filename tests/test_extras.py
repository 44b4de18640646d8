"""`pip install linvision` is enough for models and image sets; what an extra brings is asked for in words."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from linvision.cli.main import main
from linvision.extras import EXTRAS, NAMES, MissingPackage, needed
from linvision.train import train

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition('.')[0] in HIDDEN else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run_without(packages, code: str, folder: Path) -> subprocess.CompletedProcess:
    """Python in which packages cannot be found, in an empty folder."""
    code = f'HIDDEN = {set(packages)!r}\n{WITHOUT}\n{code}'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, '-c', code], cwd=folder, env=environment, capture_output=True, text=True)


def command(*words: str) -> str:
    return f'from linvision.cli.main import main\nmain({list(words)!r})'


def test_models_and_image_sets_need_no_extra(tmp_path):
    code = """
import sys, timm, torch, linvision
from PIL import Image
from pathlib import Path

before = set(sys.modules)
import linvision.cli.main
added = {name for name in set(sys.modules) - before if not name.startswith('linvision.cli')}
assert added <= {f'linvision.{name}' for name in ('extras', 'guard', 'nearest', 'version')}, added
import linvision.train

model = timm.create_model('linformer_vit_pico_patch1_32', pretrained=True).eval()
assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
plain = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=1)
assert linvision.convert.from_vit(plain, proj_len=4)(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
assert linvision.analysis.attention_maps(model, torch.randn(1, 3, 32, 32)).shape[-2:] == (32, 32)

images, label = linvision.create_dataset('fake', Path('data'), 'train')[0]
for split in ('train', 'val'):
    for name in 'ab':
        folder = Path('folder', split, name)
        folder.mkdir(parents=True)
        Image.new('L', (8, 8)).save(folder / 'one.png')
images = linvision.create_dataset('image_folder', Path('folder'), 'train')
batches = linvision.data.create_batches(images, 2, *images.statistics(), torch.device('cpu'))
assert next(iter(batches.ordered(8)))[0].shape == (2, 1, 8, 8)
for library in ('torchvision', 'torch'):
    augmentation = linvision.data.Augmentation(library, hflip=0.5)
    next(linvision.data.create_batches(images, 2, (0.5,), (0.5,), torch.device('cpu'), augmentation).stream(0, 0, 8))
print('done')
"""
    hidden = set(EXTRAS) - {'tqdm'}  # which huggingface_hub brings
    done = run_without(hidden, code, tmp_path)
    assert done.stdout == 'done\n', done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    'words',
    [
        ['train', 'fashion_mnist_pixels'],
        ['evaluate', 'outputs'],
        ['models'],
    ],
    ids=lambda words: words[0],
)
def test_a_command_names_what_installs_its_package(words, tmp_path):
    done = run_without(['tyro'], command(*words), tmp_path)
    assert done.stderr == f"error: linvision {words[0]} needs tyro: pip install 'linvision[train]'\n"
    assert done.returncode == 1


def test_a_recipe_names_what_installs_the_package_of_its_flags(monkeypatch):
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(sys, 'argv', ['linvision'])
    monkeypatch.setitem(sys.modules, 'tyro', None)  # as if it could not be found
    with pytest.raises(SystemExit, match=r"^error: linvision train needs tyro: pip install 'linvision\[train\]'$"):
        main(['train', 'fashion_mnist_pixels'])


@pytest.mark.parametrize(
    'missing, changes', [('kornia', {'augmentation': 'kornia', 'hflip': 0.5}), ('tensorboard', {})]
)
def test_libraries_name_what_installs_them(missing, changes, small_recipe, monkeypatch):
    for name in [name for name in sys.modules if missing in name.split('.')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # as if it could not be found
    with pytest.raises(MissingPackage, match=f".* needs {missing}: pip install 'linvision.train.'$"):
        train(small_recipe.replace(**changes))


def test_an_unknown_missing_module_passes_as_it_is():
    with pytest.raises(ModuleNotFoundError) as caught, needed('this'):
        import no_such_module  # noqa: F401
    assert not isinstance(caught.value, MissingPackage)


def test_the_extra_that_a_sentence_names_has_the_package():
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    for package, extra in EXTRAS.items():
        names = {re.match(r'[\w-]+', requirement)[0] for requirement in extras[extra]}
        assert NAMES.get(package, package) in names, f'{package} in [{extra}]'
