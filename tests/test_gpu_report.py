"""The GPU report, rehearsed on the CPU without the packages that a bare machine lacks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import ROOT
from scripts.benchmarks import gpu_report
from scripts.benchmarks.gpu_meter import Joules, Meter
from scripts.tools.pack_images import open_packed, pack

MISSING = ('tyro', 'kornia', 'albumentations', 'linformer', 'linformer_pytorch')
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    """A folder of a few images of two classes as one file, with the folder."""
    folder = tmp_path_factory.mktemp('images')
    for split, n in (('train', 60), ('test', 20)):
        for i in range(n):
            path = folder / split / ('dark', 'light')[i % 2] / f'{i:03}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 100, (16, 16, 3), dtype=np.uint8) + 150 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    pack(folder, folder / 'packed.npz')
    return folder


@pytest.fixture
def report(tmp_path, monkeypatch):
    for name in MISSING:
        monkeypatch.setitem(sys.modules, name, None)
    return gpu_report.Report(tmp_path, CPU, gpu_report.TINY, 600)


def lines(folder, part):
    return [row for row in gpu_report.figures(folder) if row['part'] == part]


def test_packed_images_are_those_of_the_folder(packed):
    images = open_packed(packed / 'packed.npz', 'test')
    assert images.classes == ('dark', 'light') and images.labels.tolist() == [0] * 10 + [1] * 10
    first = np.array(Image.open(packed / 'test/light/001.jpg'))
    assert torch.equal(images[10][0].permute(1, 2, 0), torch.from_numpy(first))
    assert len(open_packed(packed / 'packed.npz', 'train')) == 60 and images.note == 'JPEG copy'


@pytest.mark.slow
def test_figures_come_as_lines_the_longest_sequences_first_with_equal_tokens_a_step(report):
    gpu_report.speed(report)
    rows = lines(report.folder, 'speed')
    assert [row['tokens'] for row in rows] == [256] * 8 + [64] * 8
    assert [row['model'] for row in rows[:4]] == list(gpu_report.EAGER) and rows[0]['training']
    assert all(row['tokens'] * row['batch_size'] == 512 and len(row['steps']) == 1 for row in rows)
    alone = lines(report.folder, 'attention')
    assert [row['attention'] for row in alone] == ['module', 'function', 'scaled_dot_product_attention']
    assert all(row['steps'] for row in alone) and len(lines(report.folder, 'long')) == 1
    ran = {(row['model'], row['training']): row['attention_ran'] for row in lines(report.folder, 'detail')}
    kernel = 'aten::_scaled_dot_product_flash_attention_for_cpu'
    assert list(ran['ViT, fused', False]) == [kernel] and kernel in ran['linvision', True]
    gpu_report.tables(report)
    text = (report.folder / 'figures.md').read_text()
    for words in ('Training step, fp32', 'Attention alone, forward and backward, B1 H8 d64 K256', 'Kernels and energy'):
        assert words in text


def test_a_late_report_says_so_and_ends(report, monkeypatch):
    monkeypatch.setattr(gpu_report.gc, 'collect', lambda: None)  # of all that other tests made, at every row
    report.seconds = -1.0
    gpu_report.speed(report)
    assert {row.get('why_not') for row in lines(report.folder, 'speed')} == {'no time was left'}


def test_attention_written_out_gets_a_batch_that_fits(report, monkeypatch):
    monkeypatch.setattr(gpu_report, 'free_gib', lambda device: 139.0)
    report.sizes = gpu_report.Sizes()
    cases = {(c.tokens, c.training): c.batch_size for c in report.cases(('ViT, written out',))}
    assert cases[1024, True] == 512 and cases[4096, False] == 128  # all of 524,288 tokens a step
    assert cases[65536, False] == 2 and cases[65536, True] == 1  # the latter is refused: 336 GiB


def test_compiled_blocks_train_only_where_they_were_faster(report):
    assert gpu_report.compile_pays(report.folder) == 'off'
    for model, seconds in (('linvision', 2.0), ('linvision, compiled', 1.0)):
        report.add('speed', model=model, tokens=64, training=True, steps=[1], seconds=seconds)
    assert gpu_report.compile_pays(report.folder) == 'on'


def test_a_step_that_is_short_is_timed_many_times_together():
    calls = []
    Meter(CPU, float('inf'), least_s=0.0).measured(lambda: calls.append(1), 3)
    assert len(calls) == 2 + 3
    meter = Meter(CPU, float('inf'), least_s=1e9)
    assert len(meter.measured(lambda: calls.append(1), 2)['steps']) == 2 and len(calls) == 5 + 2 + 2 * 50
    assert Joules.of(CPU) is None and 'no_energy' in meter.energy(lambda: None)


@pytest.mark.slow
def test_minutes_of_training_leave_a_score_and_the_model(report, packed):
    gpu_report.learn(report, packed / 'packed.npz', 0.05)
    rows = lines(report.folder, 'learn')
    assert [row['model'] for row in rows] == ['tiny', 'pico']
    assert all(row['num_samples'] == 20 and row['data_note'] == 'JPEG copy' for row in rows), rows
    assert (report.folder / 'cifar10_tiny.tar.gz.0').stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_report_is_rehearsed_without_the_packages_that_the_machine_lacks(tmp_path, packed):
    """In the script's own processes, where whoever imports one of those fails."""
    for name in MISSING:
        (tmp_path / f'{name}.py').write_text(f'raise ModuleNotFoundError("blocked", name={name!r})\n')
    environment = {
        **os.environ, 'PYTHON': sys.executable, 'DEVICE': 'cpu', 'TINY': '1', 'LIMIT_S': '3600', 'PATIENCE': '5',
        'PYTHONPATH': str(tmp_path), 'OMP_NUM_THREADS': '1',
    }  # fmt: skip
    command = [
        'bash',
        str(ROOT / 'scripts/benchmarks/gpu_report.sh'),
        str(tmp_path / 'out'),
        str(packed / 'packed.npz'),
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (tmp_path / 'out/figures.jsonl').read_text().splitlines()]
    assert {row['part'] for row in found} == {'machine', 'speed', 'long', 'attention', 'detail', 'learn'}
    assert [row for row in found if row.get('why_not')] == []
    assert 'skipped' in (tmp_path / 'out/log.txt').read_text()  # the tests that need a GPU
    assert 'learnt in minutes' in (tmp_path / 'out/figures.md').read_text()
    assert sum(1 for _ in (tmp_path / 'out').iterdir()) <= 8
