"""A long command says how far it is: a bar on a terminal, lines elsewhere, and nothing that could end the work."""

import io
import sys

import timm
import torch
from runs import CPU

from linvision.data import create_batches, create_dataset
from linvision.meter import counted
from linvision.train import evaluate


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Closed(io.StringIO):
    def write(self, words):
        raise BrokenPipeError


def test_lines_say_how_much_is_done(capsys):
    assert list(counted(iter('abc'), 'fitting', 4000, 'steps', step=1000, seconds=-1.0)) == ['a', 'b', 'c']
    assert capsys.readouterr().err.splitlines() == [
        'fitting 1,000 of 4,000 steps, 0.0 min left',
        'fitting 2,000 of 4,000 steps, 0.0 min left',
    ]
    assert list(counted(iter('abc'), 'fitting', 4, 'steps', shows=False, seconds=-1.0)) == ['a', 'b', 'c']
    assert not capsys.readouterr().err


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    list(counted(range(3), 'scoring', 3, 'images', seconds=-1.0))
    assert 'scoring' in terminal.getvalue() and 'min left' not in terminal.getvalue()


def test_a_reader_that_has_gone_ends_no_work(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Closed())
    assert list(counted(range(3), 'scoring', 3, 'images', seconds=-1.0)) == [0, 1, 2]


def test_scoring_counts_images(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate.counted, '__defaults__', (1, True, -1.0))
    images = create_dataset('fake', tmp_path, 'test')
    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10)
    evaluate.evaluate(model, create_batches(images, 40, *images.statistics(), torch.device(CPU)), 16)
    assert capsys.readouterr().err.splitlines()[0].startswith('scoring 40 of 100 images')
