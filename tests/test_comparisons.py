"""What the comparisons choose, count and write, on figures that are known."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import compare_attention
import compare_conversion
import compare_pretraining
import compare_transfer
import convert_vit
import digits_folder
import model_card
import plain_cnn
import trials
from linvision.data import create_dataset, split_validation


def runs(*scores, minutes=2.0):
    return [{'top1': score, 'train_minutes': minutes, 'num_parameters': 1234} for score in scores]


def test_mean_and_spread_are_those_of_the_sample():
    assert trials.mean_and_spread([80.0, 82.0, 87.0]) == '83.0 ± 3.6'  # √((9 + 1 + 16) / 2)
    assert trials.mean_and_spread([80.04]) == '80.0'


def test_the_smallest_rate_within_a_standard_error_is_chosen():
    # the standard error of 75 % of 3,000 images is 0.79 points
    assert compare_attention.smallest_of_the_best({0.01: 0.7420, 0.02: 0.7422, 0.04: 0.75}) == 0.02
    assert compare_attention.smallest_of_the_best({0.01: 0.70, 0.02: 0.71, 0.04: 0.75}) == 0.04


def test_rates_are_tried_outwards_until_none_at_the_end_is_chosen(monkeypatch, tmp_path):
    comparison = compare_attention.Comparison(tmp_path, tmp_path, 1, 'fp32')
    asked = []

    def run(name, variants, seeds):
        asked.extend(variants)
        best = {v: 0.08 if 'N' in v else 0.02 if '16' in v else 0.005 for v in variants}
        return {v: [{'val_top1': 0.9 - 5 * abs(changed['lr'] - best[v])}] for v, changed in variants.items()}

    monkeypatch.setattr(comparison, 'run', run)
    found = comparison.choose_rates(0.1, {'K = 16': {0.01: 0.85}})
    assert [found[name]['lr'] for name in (compare_attention.FULL, 'K = 16', 'K = 64')] == [0.08, 0.02, 0.005]
    assert {name.split('lr ')[1] for name in asked if name.startswith(compare_attention.FULL)} == {
        '0.01',
        '0.02',
        '0.04',
        '0.08',
        '0.16',
    }
    assert {name.split('lr ')[1] for name in asked if '64' in name} == {'0.0025', '0.005', '0.01', '0.02', '0.04'}
    assert not {f'K = 16, lr {lr}' for lr in ('0.005', '0.01', '0.08')} & set(asked)  # 0.01 was known


def test_a_model_trained_coarse_to_fine_keeps_the_span_of_its_convolutions():
    for tokens, spans in ((256, [(1, 1)]), (1024, [(1, 1), (2, 2)])):  # tokens between taps, stage by stage
        fields = compare_attention.settings(tokens, {'proj_len': 16}, 0.01, 0.5)
        model = timm.create_model('linformer_vit_pico_patch1_32', img_size=16, in_chans=1, **fields['model_args'])
        found = []
        for size, _ in fields['stages']:
            model.set_input_size(img_size=(size, size))
            found.append(model.blocks[0].attn.local.step(model.patch_embed.grid_size))
        assert found == spans


def test_scores_of_rates_are_kept_for_runs_of_the_same_length(tmp_path):
    scores = {0.01: 0.8, 0.02: 0.7}
    short, long = (compare_attention.Known(tmp_path / 'rates.json', {'epochs': epochs}) for epochs in (0.5, 1.0))
    short.write({'K = 16': {'lr': 0.01, 'val_top1': scores}})
    assert short.read() == {'K = 16': scores} and long.read() == {}
    long.write({'K = 16': {'lr': 0.01, 'val_top1': {0.01: 0.9}}})
    assert short.read() == {'K = 16': scores} and long.read() == {'K = 16': {0.01: 0.9}}


def test_runs_that_are_recorded_are_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, 'ProcessPoolExecutor', lambda workers, *_, **__: ThreadPoolExecutor(workers))
    small = {'dataset': 'fake', 'model': 'test_linformer_vit', 'precision': 'fp32', 'epochs': 0.25}
    variants = {'one': {**small, 'stages': ((16, 1.0),), 'data_dir': tmp_path / 'here'}}
    record = trials.Record(tmp_path / 'runs.json', ('top1', 'seed'))
    first = trials.run_trials('fashion_mnist_pixels', variants, [3], 1, tmp_path / 'a', record=record)
    variants['one']['data_dir'] = tmp_path / 'there'
    same = trials.Record(tmp_path / 'runs.json', ())
    second = trials.run_trials('fashion_mnist_pixels', variants, [3], 1, tmp_path / 'b', record=same)
    assert not (tmp_path / 'b').exists() and second['one'][0]['seed'] == 3
    assert second['one'][0]['top1'] == first['one'][0]['top1']
    assert same.find(same.asked('fashion_mnist_pixels', 4, variants['one'])) is None
    other = {**variants['one'], 'epochs': 0.5}
    assert same.find(same.asked('fashion_mnist_pixels', 3, other)) is None
    again = trials.Record(tmp_path / 'runs.json', ('images_seen',), again=True)
    trials.run_trials('fashion_mnist_pixels', variants, [3], 1, tmp_path / 'a', record=again)
    assert (tmp_path / 'a' / 'one_3' / 'earlier_1').is_dir() and len(again.read()) == 1
    assert 'images_seen' in again.read()[0]['found'] and 'top1' not in again.read()[0]['found']


def test_figures_of_one_folder_of_images_are_not_those_of_another(tmp_path):
    record = trials.Record(tmp_path / 'runs.json', ())
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
    one, two = (record.asked('finetune', 0, {'data_dir': tmp_path / name}) for name in ('one', 'two'))
    assert one != two and one == record.asked('finetune', 0, {'data_dir': tmp_path / 'one', 'output_dir': tmp_path})


def test_tables_show_means_spreads_and_distances():
    full = compare_attention.FULL
    found = {
        'rates': {full: {'lr': 0.04}, 'K = 16': {'lr': 0.02}},
        'runs': {256: {full: runs(0.80, 0.82), 'K = 16': runs(0.83, 0.83, minutes=1.5) + runs(0.83, minutes=9.0)}},
    }
    lines = compare_attention.parity_table(found).splitlines()[2:]
    assert lines == [
        '| 256 | N, full attention | 0.04 | 81.0 ± 1.4 % |  | 2.0 | 2 |',
        '| 256 | 16 | 0.02 | 83.0 ± 0.0 % | +2.0 | 1.5 | 3 |',
    ]
    (line,) = compare_attention.sharing_table({'headwise': runs(0.80)}).splitlines()[2:]
    assert line == '| `headwise` | 80.0 % | 1,234 | 2.0 | 1 |'


def test_a_table_goes_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, 'ROOT', tmp_path)
    (tmp_path / 'docs').mkdir()
    page = tmp_path / 'docs/results.md'
    page.write_text('before\n<!-- a -->\nold\n<!-- /a -->\nafter\n')
    for _ in range(2):
        trials.write_table('a', '| new |')
        assert page.read_text() == 'before\n<!-- a -->\n| new |\n<!-- /a -->\nafter\n'
    with pytest.raises(ValueError, match='no place for the table: <!-- b -->'):
        trials.write_table('b', '')


def test_the_plain_network_is_as_large_as_pico_and_learns():
    network = plain_cnn.plain_cnn(1, 10)
    assert sum(p.numel() for p in network.parameters()) == 202_073
    found = plain_cnn.train_cnn('fake', Path(), minutes=0.1)
    assert found['top1'] > 0.9 and found['num_samples'] == 100


def test_baselines_are_trained_once(tmp_path):
    found = model_card.baselines(tmp_path, 'fake', Path(), minutes=0.01)
    assert found == model_card.baselines(tmp_path, 'fake', Path(), minutes=100.0)
    assert found['softmax regression']['num_parameters'] == 2570


def test_rates_are_tried_until_those_next_to_the_best_are_worse():
    peaks, asked = {'from scratch': 1e-3, 'fine-tuned': 3e-2, 'linear probe': 3e-1}, []

    def validate(pairs):
        asked.extend(pairs)
        return {(start, lr): -abs(math.log(lr / peaks[start])) for start, lr in pairs}

    best, scores = compare_transfer.choose_rates(dict.fromkeys(peaks, 1e-2), validate)
    assert best == peaks and len(asked) == len(set(asked))
    assert list(scores['from scratch']) == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert list(scores['fine-tuned']) == [3e-3, 1e-2, 3e-2, 1e-1]
    assert list(scores['linear probe']) == [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]


def test_transfer_shows_the_distance_from_scratch_seed_by_seed():
    found = {'5': {'from scratch': runs(0.80, 0.82, 0.81), 'fine-tuned': runs(0.83, 0.83, 0.87)}}
    rates = {'5': {'from scratch': 0.01, 'fine-tuned': 0.003}}
    assert compare_transfer.table(found, rates).splitlines()[2:] == [
        '| 5 | from scratch | 0.01 | 81.0 ± 1.0 % |  | 2.0 | 3 |',
        '| 5 | fine-tuned | 0.003 | 84.3 ± 2.3 % | +3.3 (s.e. 1.5) | 2.0 | 3 |',  # of 3, 1 and 6: 2.52 / √3
    ]


def test_pretraining_shows_the_difference_seed_by_seed():
    seen = {'images_seen': 1000}
    found = {
        'from scratch': [run | seen for run in runs(0.80, 0.82)],
        'masked pixels first': [run | seen for run in runs(0.79, 0.79)],
    }
    lines = compare_pretraining.table(found, {'from scratch': 0.02, 'masked pixels first': 0.01}).splitlines()
    assert lines[2] == '| from scratch | 0.02 | 81.0 ± 1.4 % | 1,000 | 2.0 | 2 |'
    assert lines[-1] == 'Masked pixels first: -2.0 points, standard error 1.0.'


def test_conversion_is_compared_at_the_rate_that_validation_chose_and_for_equal_minutes(tmp_path, monkeypatch):
    asked, tables = {}, {}

    def run_trials(recipe, variants, seeds, workers, folder):
        asked.update({name: (recipe, own) for name, own in variants.items()})
        best = {'K = 64': 5e-4, 'K = 16': 2e-3}
        scores = {n: {'val_top1': 0.9 - 0.1 * (own.get('lr') != best.get(n[:6]))} for n, own in variants.items()}
        return {name: [{'top1': 0.885, 'train_minutes': 3.25, 'seed': 0} | scores[name]] for name in variants}

    def convert(self, K, steps):
        return {'pooled': {'top1': 0.2}, 'fitted': {'top1': 0.5}}

    monkeypatch.setattr(compare_conversion, 'run_trials', run_trials)
    monkeypatch.setattr(compare_conversion.Comparison, 'convert', convert)
    monkeypatch.setattr(compare_conversion, 'resolved', lambda recipe: recipe.replace(img_size=32))
    monkeypatch.setattr(compare_conversion, 'ROOT', tmp_path)
    monkeypatch.setattr(compare_conversion, 'write_table', tables.__setitem__)
    (tmp_path / 'docs').mkdir()
    compare_conversion.main(data_dir=tmp_path, output_dir=tmp_path / 'runs')
    recipe, distilled = asked['K = 16, distilled']
    assert (recipe, distilled['lr'], asked['K = 64, distilled'][1]['lr']) == ('distill_from_vit', 2e-3, 5e-4)
    assert distilled['init'] != distilled['teacher'] == str(tmp_path / 'runs/teacher_0')
    recipe, scratch = asked['K = 16, from scratch']
    assert (
        recipe == 'fashion_mnist_vit'
        and scratch['max_minutes'] == 3.25
        and 'init' not in scratch
        and scratch['stages'] == ((32, 1.0),)
    )
    assert {own['val_fraction'] for _, own in asked.values()} == {0.05}  # the same slice, unseen by the teacher too
    assert tables['conversion'].splitlines()[2:] == [
        '| N, the teacher | 88.5 % | | | | |',
        '| 64 | 20.0 % | 50.0 % | 88.5 % | 88.5 % | 3.2 |',
        '| 16 | 20.0 % | 50.0 % | 88.5 % | 88.5 % | 3.2 |',
    ]


def test_a_conversion_is_fitted_kept_and_taught_without_the_validation_slice(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_conversion, 'evaluate', lambda model, batches, size: {'top1': 0.5})
    comparison = compare_conversion.Comparison('fake', tmp_path, tmp_path, 1, 'fp32')
    recipe = trials.changed_recipe('fashion_mnist_vit', 0, {})
    teacher = timm.create_model(recipe.model, img_size=32, in_chans=1, num_classes=10, **recipe.model_args)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': (0.5,), 'std': (0.5,), 'crop_pct': 1.0}
    save_for_hf(teacher, str(comparison.where('teacher')), safe_serialization=True)
    found = comparison.convert(64, 2)
    assert found == comparison.convert(64, 2) and len(found['attention_error']) == 2
    with pytest.raises(ValueError, match="'steps': 2}, not .*'steps': 3}: name another folder"):
        comparison.convert(64, 3)
    images = convert_vit.ImagesOf(teacher, 'fake', tmp_path, 32, torch.device('cpu'))
    slice_ = split_validation(create_dataset('fake', tmp_path, 'train'), 0.05, 0)[1]
    assert len(slice_) == 13 and images.batches('train', without=0.05).order.n == 256 - 13
    fields = comparison.scratch(64, 1.0)
    student = timm.create_model(fields['model'], img_size=32, in_chans=1, num_classes=10, **fields['model_args'])
    for size, _ in fields['stages']:
        student.set_input_size(img_size=(size, size))
        assert not any(block.attn.is_full(student.patch_embed.grid_size) for block in student.blocks)
    assert student.projection is not None and student.patch_embed.num_patches == 256


def test_the_digits_folder_holds_every_image_once_and_a_fifth_of_each_class_apart(tmp_path):
    sklearn = pytest.importorskip('sklearn.datasets', reason='needs the [digits] extra')
    digits_folder.main(tmp_path / 'digits')
    train, val = (create_dataset('image_folder', tmp_path / 'digits', split) for split in ('train', 'test'))
    assert len(train) + len(val) == 1797 and train.classes == tuple('0123456789') and train.in_chans == 1
    counts = torch.bincount(torch.tensor(sklearn.load_digits().target))
    assert torch.equal(torch.bincount(torch.tensor([label for _, label in val])), counts // 5)
    image, label = val[0]
    assert label == 0 and image.size == (8, 8)
    with pytest.raises(SystemExit, match='exists'):
        digits_folder.main(tmp_path / 'digits')
