"""`linvision models`: which names it shows, as text, JSON and Markdown, and that none of it is slow or silent."""

import json
from pathlib import Path

import pytest

from linvision.cli import models
from linvision.cli.main import main

ROOT = Path(__file__).parents[1]


def test_the_table_is_aligned_and_of_the_names_that_a_pattern_fits(capsys):
    main(['models', 'pico_patch*_32'])
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f'linformer_vit_pico_patch{p}_32' for p in (1, 2, 4)]
    assert {len(line) for line in lines} == {len(head)}
    assert lines[0].split()[1:] == ['1,024', '64', 'separable', '64/4/2', '268,712']


def test_models_with_weights_have_their_scores(capsys):
    main(['models', '--pretrained'])
    lines = capsys.readouterr().out.splitlines()[1:]
    scores = {'cifar10': '83.94', 'fashion_mnist': '93.39', 'tiny_imagenet': '37.79'}
    for line, (tag, score) in zip(lines, scores.items(), strict=True):
        assert line.split()[0].endswith(f'.{tag}') and f'{score} % on {tag}' in line
    main(['models', '--pretrained', '--json'])
    found = json.loads(capsys.readouterr().out)
    assert [(row['top1'], row['parameters']) for row in found] == [(0.8394, 204362), (0.9339, 204234), (0.3779, 217288)]


def test_a_row_is_there_before_the_next_is_built():
    rows = models.plain(['a', 'b'], iter([models.facts('test_linformer_vit')]), ['tokens'])
    assert [next(rows).split(), next(rows).split()] == [['name', 'tokens'], ['test_linformer_vit', '256']]


def test_multiply_adds_are_counted_where_they_are_wished(tmp_path, capsys):
    main(['models', 'test_linformer_vit', '--multiply-adds'])
    assert '0.00608 G' in capsys.readouterr().out
    assert 'multiply_adds' not in models.facts('test_linformer_vit')
    main(['models', 'test_linformer_vit', '--output', str(tmp_path / 'models.md')])
    page, kept = (tmp_path / 'models.md').read_text(), (ROOT / 'docs/models.md').read_text()
    assert page.splitlines()[-1].startswith('| `test_linformer_vit`') and kept.startswith(page)


def test_a_pattern_that_fits_nothing_lists_the_nearest_names():
    with pytest.raises(SystemExit, match=r"Unknown model 'picko'. Nearest: .*pico_patch\d.* is like 'pico\*'"):
        main(['models', 'picko'])
