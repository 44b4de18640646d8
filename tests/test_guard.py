"""A user's mistake ends in a sentence and exit code 2, wherever a program begins; a fault of ours in its traceback."""

import io
import logging
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from linvision.cli.main import main
from linvision.guard import ISSUES, Mistake, guarded

ROOT = Path(__file__).parents[1]
SCRIPTS = [path for path in sorted(ROOT.glob('scripts/**/*.py')) if "__name__ == '__main__'" in path.read_text()]


@pytest.mark.parametrize(
    'error, words',
    [
        (ValueError('lr must be positive.'), 'error: lr must be positive.'),
        (FileNotFoundError(), 'error: FileNotFoundError'),  # timm raises it without a word
        (MemoryError('no room'), 'error: no room'),
        (TypeError("f() got an unexpected keyword argument 'betaz'"), "error: .* unexpected keyword argument 'betaz'"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'error: .* Choose smaller sizes'),
        (RuntimeError('DataLoader worker (pid 7) exited'), 'error: DataLoader worker .* try fewer --workers'),
    ],
)
def test_a_mistake_is_a_sentence(error, words, capsys):
    with pytest.raises(Mistake, match=words) as end, guarded():
        raise error
    said = capsys.readouterr().err
    assert end.value.code == 2 and said == f'{end.value}\n'


@pytest.mark.parametrize('words', [['models'], ['predict', 'x', 'x.png'], ['train', '--list']])
def test_ctrl_c_ends_a_command_in_a_sentence_and_130(words, monkeypatch, capsys):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr('tyro.cli', pressed)
    monkeypatch.setattr('linvision.cli.train.main', pressed)
    try:
        with pytest.raises(SystemExit) as end:
            main(words)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end.value.code == 130 and capsys.readouterr().err == 'stopped by Ctrl-C\n'


@pytest.mark.parametrize(
    'error', [KeyError('x'), RuntimeError('shape'), TypeError('unsupported'), AssertionError('why')]
)
def test_a_fault_of_ours_keeps_its_traceback_and_says_where_to_report_it(error, capsys):
    with pytest.raises(type(error)) as end, guarded():
        raise error
    assert end.value is error and ISSUES in error.__notes__[0] and not capsys.readouterr().err


def test_on_request_a_mistake_shows_where_it_was_raised(monkeypatch):
    monkeypatch.setenv('LINVISION_TRACEBACK', '1')
    with pytest.raises(ValueError, match='here') as end, guarded():
        raise ValueError('here')
    assert not hasattr(end.value, '__notes__')


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
def test_what_the_terminal_cannot_show_is_escaped_and_all_is_printed(encoding, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', err)
    names = ['猫.png', 'h\xe9.png', 'lost\udcff.png']
    with guarded():
        for name in names:
            print(name)
        logger = logging.getLogger('test_guard')
        logger.addHandler(logging.StreamHandler(err))
        logger.warning(names[0])
        list(tqdm([1], names[0]))
    printed = out.buffer.getvalue().decode(encoding).splitlines()
    assert len(printed) == 3 and printed[2] == 'lost\\udcff.png'
    assert printed[0] == names[0] if encoding == 'utf-8' else printed[0] == '\\u732b.png'
    assert err.buffer.getvalue()


@pytest.mark.parametrize('path', [*SCRIPTS, ROOT / 'recipes/segment_pixels.py'], ids=lambda p: p.stem)
def test_every_script_has_the_guard_and_no_ending_of_its_own(path):
    text = path.read_text()
    entry = 'def command() -> None:' if path.parent.name == 'recipes' else "if __name__ == '__main__':"
    assert re.search(rf'^{re.escape(entry)}\n(    """.*"""\n)?    with guarded\(\):\n', text, re.MULTILINE)
    assert "sys.exit(f'error" not in text and "sys.exit('error" not in text and "SystemExit(f'error" not in text


@pytest.mark.parametrize(
    'words, said',
    [
        (
            ['scripts/benchmarks/profile_step.py', '--model', 'linvisoin'],
            "Unknown model 'linvisoin'. Nearest: linvis",
        ),
        (['scripts/benchmarks/profile_step.py', '--tokens', '50'], 'error: tokens must be a square number'),
        (['scripts/tools/digits_folder.py', '--output-dir', '.'], r'error: \. exists; remove it'),
        (['scripts/tools/imagenet_layout.py', '--output-dir', 'pyproject.toml'], 'error: .*pyproject.toml'),
        (['scripts/tools/model_card.py', 'nothing'], 'error: .*nothing'),
        (['scripts/tools/debian.py'], 'error: Expected a package'),
        (['recipes/segment_pixels.py', '--canvas', '5'], 'error: canvas must be a multiple of 16'),
        (['recipes/segment_pixels.py', '--minutes', '0'], 'error: minutes must be above 0, got 0.0'),
        (['recipes/segment_pixels.py', '--backbone', 'resnet18'], "error: Unknown backbone 'resnet18'"),
    ],
    ids=lambda v: Path(v[0]).stem if isinstance(v, list) else '',
)
def test_a_script_ends_a_mistake_in_a_sentence(words, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(Mistake, match=said):
        runpy.run_path(words[0], run_name='__main__')


class Gone(io.StringIO):
    """What is written to reaches nobody."""

    def flush(self):
        raise BrokenPipeError

    def fileno(self):
        return -1


@pytest.mark.parametrize('error, code', [(ValueError('the loss is wrong'), 2), (SystemExit(3), 3), (SystemExit(0), 0)])
def test_a_reader_that_has_gone_hides_no_error(error, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdout', Gone())
    monkeypatch.setattr(os, 'dup2', lambda *files: None)
    ended = 0
    try:
        with guarded():
            raise error
    except SystemExit as end:
        ended = end.code
    assert ended == code
    assert ('the loss is wrong' in capsys.readouterr().err) == (code == 2)
