"""The figures of docs/sequence.md are those of their script, and the measurement runs."""

import json
from pathlib import Path

import pytest

from scripts.benchmarks import sequence, sequence_estimate

ROOT = Path(__file__).parents[1]


def test_the_page_has_the_table_of_the_estimate():
    assert sequence_estimate.table() in (ROOT / 'docs/sequence.md').read_text()


def test_the_page_has_the_table_of_the_measurement():
    rows = json.loads((ROOT / 'scripts/benchmarks/results/sequence.json').read_text())['rows']
    assert sequence.table(rows) in (ROOT / 'docs/sequence.md').read_text()


def test_the_estimate_starts_from_the_count_for_one_gpu():
    row = next(line for line in (ROOT / 'docs/gpu_count.md').read_text().splitlines() if 'tiny, 65,536 | auto' in line)
    _, _, _, kernels, _, _, modelled_ms, launch_ms, _ = row.split('|')
    assert float(modelled_ms) == pytest.approx(sequence_estimate.MS_PER_TOKEN * 8 * 65536)
    assert float(launch_ms) == sequence_estimate.LAUNCH_MS and kernels.strip() in sequence_estimate.__doc__


def test_the_table_has_the_ratio_to_one_process():
    way = dict(model='pico', tokens=256, training=False, precision='fp32', threads=2)
    rows = [
        dict(way, processes=1, steps=3, seconds=2.0, peak_gib=4.0),
        dict(way, processes=2, steps=3, seconds=1.0, peak_gib=3.0),
    ]
    assert sequence.table(rows).splitlines()[-1].endswith('| 1.00 | 3.00 | 0.50 | 0.75 |')


@pytest.mark.slow
def test_a_small_measurement_runs_both_ways(tmp_path):
    sequence.main(tokens=(1024,), precision='fp32', rounds=1, steps=1, output=tmp_path / 'found.json')
    rows = json.loads((tmp_path / 'found.json').read_text())['rows']
    assert [(row['processes'], row['training']) for row in rows] == [(1, False), (2, False), (1, True), (2, True)]
    assert all(row['seconds'] > 0 and row['peak_gib'] >= 0 for row in rows)
