"""The `linvision` command: what it finds, what it imports, and how it ends."""

import json
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from test_recipes import NAMES, OWN_LOOP, SHORT, SMALL

from linvision.cli import program as command_program
from linvision.cli import train
from linvision.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """What training sets is put back: the program's name and the places to import from."""
    monkeypatch.setattr(sys, 'argv', ['linvision'])
    monkeypatch.setattr(sys, 'path', sys.path[:])


def test_help_names_every_command_and_every_command_has_a_module(capsys):
    with pytest.raises(SystemExit) as end:
        main(['--help'])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(name in shown for name in COMMANDS)
    assert all((ROOT / 'linvision' / 'cli' / f'{name}.py').is_file() for name in COMMANDS)


@pytest.mark.parametrize('name', [name for name in COMMANDS if name != 'train'])
def test_every_command_shows_its_flags(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, '--help'])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and f'usage: linvision {name}' in shown


def test_an_unknown_command_lists_the_nearest():
    with pytest.raises(SystemExit, match="error: Unknown command 'evalute'. Nearest: evaluate"):
        main(['evalute'])


def fail(error, monkeypatch):
    def broken(output=None):
        raise error

    monkeypatch.setattr('linvision.cli.models.main', broken)


@pytest.mark.parametrize(
    'error', [ValueError('no'), FileNotFoundError('no'), TypeError("f() got an unexpected keyword argument 'no'")]
)
def test_a_mistake_is_one_line_unless_the_traceback_is_wished(error, monkeypatch):
    fail(error, monkeypatch)
    with pytest.raises(SystemExit, match='^error: .*no') as end:
        main(['models'])
    assert end.value.code == 2 and '\n' not in str(end.value)
    monkeypatch.setenv('LINVISION_TRACEBACK', '1')
    with pytest.raises(type(error)):
        main(['models'])


@pytest.mark.parametrize('error', [TypeError('unsupported operand'), KeyError('no'), RuntimeError('no')])
def test_a_fault_of_our_own_keeps_its_traceback(error, monkeypatch):
    fail(error, monkeypatch)
    with pytest.raises(type(error)):
        main(['models'])


@pytest.mark.slow
@pytest.mark.parametrize('words', ['--help', 'models --help', 'train --list'])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    words = f'{sys.executable} -m linvision {words} | head -n 1'
    done = subprocess.run(['bash', '-o', 'pipefail', '-c', words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout and not done.returncode and 'Error' not in done.stderr


def test_the_catalogue_is_the_first_line_of_every_recipe(capsys):
    main(['train', '--list'])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {*NAMES, OWN_LOOP}
    assert '  cifar100_pixels        CIFAR-100, pixel by pixel: 1,024 tokens.' in lines


PROGRAM = """
import sys
sys.path.append('linvision/cli')
import program
sys.modules['linvision_command'] = program  # as the wheel has it, beside the package
sys.argv[1:] = {}
program.main()
print('torch' in sys.modules)
"""


@pytest.mark.parametrize('words', [['--version'], ['train', '--list']])
def test_the_program_answers_without_torch(words):
    code = PROGRAM.format(words)
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) > 1 and done.stdout.endswith('\nFalse\n')


@pytest.mark.slow
def test_the_program_registers_the_models_where_a_command_needs_them():
    code = PROGRAM.format(['models', 'test*']) + 'import linvision; print(linvision.LinformerVisionTransformer)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'test_linformer_vit' in done.stdout and 'LinformerVisionTransformer' in done.stdout


def test_an_unknown_recipe_lists_the_nearest():
    with pytest.raises(SystemExit, match="error: Unknown recipe 'cifar10_pixel'. Nearest: cifar10_pixels"):
        main(['train', 'cifar10_pixel'])
    with pytest.raises(SystemExit, match='error: .*mine.py does not exist'):
        main(['train', 'mine.py'])
    with pytest.raises(SystemExit, match='The recipe comes first'):
        main(['train', '--epochs', '3', 'cifar10_pixels'])


def test_a_recipe_shows_its_page_and_its_flags(capsys):
    for name, flag in (('cifar100_pixels', '--stages'), ('segment_pixels', '--network')):
        with pytest.raises(SystemExit) as end:
            main(['train', name, '--help'])
        shown = capsys.readouterr().out
        assert end.value.code == 0 and flag in shown and f'usage: linvision train {name} ' in shown


def test_a_recipe_that_changes_another_trains_by_its_name(tmp_path):
    main(['train', 'cifar100_pixels', *SMALL, *SHORT, '--val-fraction', '0', '--output-dir', str(tmp_path)])
    assert json.loads((tmp_path / 'metrics.json').read_text())['steps'] == 2


def test_a_file_of_ones_own_trains_and_may_begin_from_a_recipe(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text('from cifar10_pixels import RECIPE as CIFAR10\n\nRECIPE = CIFAR10.replace(seed=5)\n')
    main(['train', str(file), *SMALL, *SHORT, '--val-fraction', '0', '--output-dir', str(tmp_path / 'run')])
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['recipe']['seed'] == 5
    file.write_text('"""Nothing."""\n')
    with pytest.raises(SystemExit, match='defines no RECIPE'):
        main(['train', str(file)])


def test_recipes_are_found_in_an_installed_package_too(tmp_path, monkeypatch):
    monkeypatch.setattr(train, '__file__', str(tmp_path / 'linvision/cli/train.py'))
    monkeypatch.setattr(train.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match='neither .* nor the package linvision.recipes'):
        train.recipe_folder()


def test_the_wheel_is_told_of_the_command_and_the_recipes():
    settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    assert settings['project']['scripts'] == {'linvision': 'linvision_command:main'}
    brought = settings['tool']['hatch']['build']['targets']['wheel']['force-include']
    assert brought == {'recipes': 'linvision/recipes', 'linvision/cli/program.py': 'linvision_command.py'}


def test_links_of_the_readme_lead_somewhere_on_pypi():
    """PyPI follows no path of the repository: each gets the address that the rules in pyproject.toml give it."""
    settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    text = (ROOT / 'README.md').read_text()
    for rule in settings['tool']['hatch']['metadata']['hooks']['fancy-pypi-readme']['substitutions']:
        text = re.sub(rule['pattern'], rule['replacement'], text)
    links = re.findall(r'\]\(([^)]+)\)', text)
    assert len(links) > 10 and all(link.startswith('https://') for link in links)
    assert 'https://raw.githubusercontent.com/linvision/linvision/main/docs/images/time.png' in links


@pytest.mark.slow
def test_a_recipe_trains_by_its_name_in_two_processes_by_torchrun(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    flags = [*SMALL, *SHORT, '--val-fraction', '0', '--output-dir', str(tmp_path)]
    words = [*command, '-m', 'linvision', 'train', 'cifar10_patch2', *flags]
    subprocess.run(words, check=True, capture_output=True, timeout=240, cwd=ROOT)
    assert json.loads((tmp_path / 'metrics.json').read_text())['processes'] == 2


def test_ctrl_c_while_the_command_is_imported_ends_it_without_a_traceback(monkeypatch):
    class Importing(types.ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt if name == 'main' else AttributeError(name)

    monkeypatch.setitem(sys.modules, 'linvision.cli.main', Importing('main'))
    monkeypatch.setattr(command_program, 'registers_later', False)
    with pytest.raises(SystemExit) as ended:
        command_program.main()
    assert ended.value.code == 130
