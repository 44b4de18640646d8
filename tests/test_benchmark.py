"""The benchmarks' own arithmetic, and a reduced run; `test_gpu_report.py` rehearses that of a GPU."""

import json
import sys

import pytest

from scripts import ROOT
from scripts.benchmarks import profile_step, speed
from scripts.benchmarks.contenders import PROJ_LEN, SIZE, Case, build, multiply_adds, predicted_gib
from scripts.benchmarks.tables import markdown

D, DEPTH, HEADS = SIZE.values()


def linear_layers(tokens: int) -> int:
    """Multiply-adds of what all contenders share: the MLP, query and output, patch embedding and head."""
    return DEPTH * tokens * 10 * D * D + tokens * 3 * D + 1000 * D


def test_multiply_adds_are_those_of_the_closed_formulas():
    N = 1024
    vit = multiply_adds(Case('ViT, fused', N, False, 'fp32'))
    assert vit == linear_layers(N) + DEPTH * N * 2 * D * D + DEPTH * 2 * N * N * D
    assert multiply_adds(Case('ViT, written out', N, False, 'fp32')) == vit
    rows = DEPTH * PROJ_LEN * 2 * D * (D + 1)  # keys and values, and their biases by the row sums of E
    linear_e = multiply_adds(Case('linvision, linear E', N, False, 'fp32'))
    local = 9 * N * D * (DEPTH + 1)  # a depth-wise 3 × 3 in each block, and one for the positions
    reduction = DEPTH * N * PROJ_LEN * D + N * PROJ_LEN  # E x in each block, and the row sums of E once
    assert linear_e == linear_layers(N) + rows + DEPTH * 2 * N * PROJ_LEN * D + reduction + local
    side, factor = 32, 16
    separable = (DEPTH * D + 1) * (factor * side * side + factor * factor * side)
    assert multiply_adds(Case('linvision', N, False, 'fp32')) == linear_e - reduction + separable


@pytest.mark.parametrize('model', ['linvision', 'ViT, fused', 'linformer'])
def test_contenders_have_the_same_size(model):
    blocks = DEPTH * 12 * D * D
    built = build(Case(model, 64, False, 'fp32'))
    projections = sum(p.numel() for n, p in built.named_parameters() if 'proj_' in n or n.startswith('projection'))
    total = sum(p.numel() for p in built.parameters()) - projections - 1000 * D
    assert 0.99 * blocks < total < 1.02 * blocks


def test_attention_that_cannot_fit_is_predicted():
    """Scores and weights of 65,536 tokens: 3 heads × 65,536² numbers of 4 bytes, twice."""
    assert predicted_gib(Case('ViT, written out', 65536, False, 'fp32')) > 3 * 65536**2 * 4 * 2 / 2**30
    assert predicted_gib(Case('ViT, fused', 65536, False, 'fp32')) < 1


def test_what_fits_is_not_predicted_to_be_too_large():
    rows = json.loads((ROOT / 'scripts/benchmarks/results/speed.json').read_text())['rows']
    for row in rows:
        if row['steps'] and row['peak_gib'] > 0.08:  # below it, what the process itself needs comes and goes
            assert predicted_gib(Case(*(row[k] for k in speed.KEY))) < row['peak_gib'], row['model']


def test_a_missing_package_is_a_reason_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'linformer', None)
    monkeypatch.setitem(sys.modules, 'linformer_pytorch', None)
    (row,) = speed.measure([Case('linformer', 64, False, 'fp32')], 1, float('inf'), 60, 1e9, 1, print)
    assert row['why_not'] == "this row needs linformer: pip install 'linvision[bench]'" and not row['steps']


def test_tokens_that_make_no_square_are_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match='must be a square number, for a square image, got 1,000'):
        speed.main(tmp_path / 'b', tokens=(64, 1000))


def test_the_table_gives_medians_ratios_and_reasons():
    def row(model, seconds):
        row = {'model': model, 'tokens': 4096, 'training': False, 'precision': 'fp32', 'multiply_adds': 10**9}
        if seconds is None:
            return {**row, 'steps': [], 'why_not': 'needs at least 51 GiB'}
        steps = [{'seconds': seconds}, {'seconds': 1.5 * seconds}]
        return {**row, 'steps': steps, 'seconds': seconds, 'peak_gib': seconds / 10}

    rows = [
        row('linvision', 0.5), row('linvision, K = 128', 0.25), row('ViT, fused', 3.0), row('ViT, written out', None)
    ]  # fmt: skip
    machine = {'cpu': 'a CPU', 'threads': 2, 'date': '2026-01-01', 'versions': {'torch': '2'}}
    roofline = {'fp32': {'square_gflops': 8.0, 'shapes_gflops': 5.0}}
    text = markdown({'machine': machine, 'command': 'python x', 'roofline': roofline, 'rows': rows})
    assert '| ViT, fused | 3 s (6×), 0.3 GiB |' in text
    assert 'by 50 % (median over cases) and 50 % (nine in ten); 0 cases were taken once' in text
    assert '| ViT, written out | needs at least 51 GiB |' in text
    assert (
        '| 4,096, fp32 | 3.4× faster, 14× less memory | needs at least 51 GiB | 12× faster, 12× less memory |' in text
    )
    assert '| 4,096, fp32 | 4 | 50 % of 8 | 80 % of 5 |' in text


@pytest.mark.slow
def test_the_benchmark_measures_each_case_in_a_process_of_its_own(tmp_path):
    names = ('linvision', 'ViT, fused')
    speed.main(tmp_path / 'b', False, names, (64,), ('training',), ('fp32',), repeats=2, threads=1)
    found = json.loads((tmp_path / 'b.json').read_text())
    assert [row['model'] for row in found['rows']] == ['linvision', 'ViT, fused']
    for row in found['rows']:
        assert len(row['steps']) == 2 and row['seconds'] > 0 and 0 < row['peak_gib'] < 1
        assert row['peak_gib'] >= 4 * row['parameters'] / 2**30  # the gradients at least
    assert (tmp_path / 'b.png').stat().st_size > 10_000
    updated = {'models': ('linvision',), 'tokens': (64,), 'modes': ('training',), 'precisions': ('fp32',)}
    speed.main(tmp_path / 'b', **updated, repeats=1, threads=1, update=True)
    again = json.loads((tmp_path / 'b.json').read_text())
    assert again['rows'][0] == found['rows'][1] and len(again['rows'][1]['steps']) == 1  # the other model is kept
    (tmp_path / 'b.json').write_text(json.dumps(found))
    kept = speed.earlier(tmp_path / 'b.json', {'machine': found['machine'], 'command': 'again'})
    assert kept['rows'] == found['rows'] and kept['command'] == found['command'] + '; again'
    with pytest.raises(ValueError, match='measured with another threads'):
        speed.earlier(tmp_path / 'b.json', {'machine': {**found['machine'], 'threads': 9}, 'command': ''})


def test_attention_is_fused_in_what_is_built_after_attention_written_out():
    build(Case('ViT, written out', 64, False, 'fp32'))
    assert build(Case('linvision', 64, False, 'fp32')).blocks[0].attn.fused_attn


@pytest.mark.slow
def test_a_profile_accounts_for_the_whole_step(capsys):
    profile_step.main(tokens=64, precision='fp32', threads=1, rows=3)
    lines = capsys.readouterr().out.splitlines()
    shares = [int(line.split('|')[-2].split()[0]) for line in lines if line.endswith('% |')]
    assert len(shares) == 4 and 97 <= sum(shares) <= 103  # each is rounded
