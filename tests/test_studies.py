"""What the studies choose, count and write, on figures that are known."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from linvision.cli.images import ImagesOf
from linvision.data import create_dataset, split_validation
from scripts import ROOT
from scripts.studies import attended, attention, changes, conversion, few_labels, tables, transfer, trials
from scripts.studies import run as command
from scripts.tools import digits_folder, model_card, plain_cnn

FULL = attention.FULL


def flags(folder, **own):
    return trials.SeedFlags(workers=1, data_dir=folder, output_dir=folder, **own)


def answering(monkeypatch, score):
    """Let runs give a score, and train nothing; what is asked for, by title."""
    asked = {}

    def run(self, recipe, variants, seeds=(0,), folder='', before=None):
        asked.update({name: (recipe, {**self.common, **own}) for name, own in variants.items()})
        return {name: [score(name, own) for _ in seeds] for name, own in variants.items()}

    monkeypatch.setattr(trials.Trials, 'run', run)
    return asked


def runs(*scores, minutes=2.0):
    return [{'top1': score, 'train_minutes': minutes, 'num_parameters': 1234} for score in scores]


def test_mean_and_spread_are_those_of_the_sample():
    assert tables.mean_and_spread([80.0, 82.0, 87.0]) == '83.0 ± 3.6'  # √((9 + 1 + 16) / 2)
    assert tables.mean_and_spread([80.04]) == '80.0'


def test_the_smallest_rate_within_a_standard_error_is_chosen():
    # the standard error of 75 % of 3,000 images is 0.79 points
    assert attention.smallest_of_the_best({0.01: 0.7420, 0.02: 0.7422, 0.04: 0.75}) == 0.02
    assert attention.smallest_of_the_best({0.01: 0.70, 0.02: 0.71, 0.04: 0.75}) == 0.04


def test_rates_are_tried_outwards_until_none_at_the_end_is_chosen(monkeypatch, tmp_path):
    variants = attention.variants_of(256, 0.1)
    peaks = {FULL: 0.08, 'K = 16': 0.02, 'K = 64': 0.005}
    asked = answering(
        monkeypatch, lambda name, own: {'val_top1': 0.9 - 5 * abs(own['lr'] - peaks[name.partition(', lr')[0]])}
    )
    first, around = dict.fromkeys(variants, attention.RATES), lambda lr: (lr / 2, 2 * lr)
    own = trials.Trials('attention', flags(tmp_path))
    best, scores = own.choose_rates('', variants, first, around, known={'K = 16': {0.01: 0.85}})
    assert best == peaks and all(not own['test'] for _, own in asked.values())
    assert list(scores[FULL]) == [0.01, 0.02, 0.04, 0.08, 0.16]
    assert list(scores['K = 64']) == [0.0025, 0.005, 0.01, 0.02, 0.04]
    assert list(scores['K = 16']) == [0.01, 0.02, 0.04]
    assert 'K = 16, lr 0.01' not in asked  # which was known


def test_a_model_trained_coarse_to_fine_keeps_the_span_of_its_convolutions():
    for tokens, spans in ((256, [(1, 1)]), (1024, [(1, 1), (2, 2)])):  # tokens between taps, stage by stage
        fields = attention.variants_of(tokens, 0.5)['K = 16']
        model = timm.create_model('linformer_vit_pico_patch1_32', img_size=16, in_chans=1, **fields['model_args'])
        found = []
        for size, _ in fields['stages']:
            model.set_input_size(img_size=(size, size))
            found.append(model.blocks[0].attn.local.step(model.patch_embed.grid_size))
        assert found == spans


def test_scores_of_an_earlier_go_are_those_of_runs_of_the_same_length():
    file, run = tables.RESULTS / 'rates.json', {'epochs': 0.5, 'precision': 'fp32'}
    known = attention.known_scores(file, run)
    assert known['K = 16'][0.005] == 0.844 and known[FULL][0.02] == 0.832
    assert attention.known_scores(file, run | {'epochs': 1.0}) == {}
    assert attention.known_scores(file, run | {'precision': 'bf16'}) == {}


@pytest.mark.parametrize('study', ['norms', 'parity', 'sharing'])
def test_a_study_whose_runs_are_all_kept_trains_nothing_and_finds_its_table(study, monkeypatch):
    """The keys of the records are what the studies ask for, and the pages show what the records hold."""

    def submit(self, train, recipe, name, *_):
        raise AssertionError(f'{name} of {recipe} is not in the record')

    def show(name, result, text, page='results.md', mark=''):
        assert f'<!-- {mark or name} -->\n{text}\n<!--' in (ROOT / 'docs' / page).read_text()
        shown.append(name)

    shown = []
    monkeypatch.setattr(trials.ProcessPoolExecutor, 'submit', submit)
    for module in (attention, changes):
        monkeypatch.setattr(module, 'publish', show)
    monkeypatch.setattr(attention, 'draw', lambda rows, path: None)
    command.main([study])
    assert shown == [study]


def test_runs_of_one_thing_changed_differ_in_nothing_else(monkeypatch, tmp_path):
    found = {}
    figures = {'val_top1': 0.5, 'images_seen': 9, 'num_parameters': 1}
    asked = answering(monkeypatch, lambda name, own: figures)
    monkeypatch.setattr(changes, 'publish', lambda name, result, text, page, mark: found.update({mark: text}))
    command.main(['choices', '--lengths', 'stages', '4', '--seeds', '2'])
    first = asked.pop('separable E, conv positions, local path, Muon')[1]
    model = {name: own for name, (_, own) in asked.items() if own['stages'] == ((16, 1.0),)}
    assert len(model) == 8 and len(asked) == 11 and first['precision'] == 'bf16' and not first['test']
    for own in model.values():
        different = {k for k in own if own[k] != first.get(k)}
        assert different in ({'model_args'}, {'opt', 'lr'}, set())  # in nothing: E starts otherwise
        assert own['max_minutes'] == 2.0
    assert asked['50% of the time at 16×16'][1]['max_minutes'] == 4.0
    assert found['stages'].splitlines()[2] == '| 75% of the time at 16×16 | 50.0 ± 0.0 % | 9 | 1 | 2 |'
    with pytest.raises(ValueError, match=r"tables of choices are model, stages; a length was given of \['epochs'\]"):
        command.main(['choices', '--lengths', 'epochs', '4'])


def test_every_study_says_what_it_is_to_answer_and_what_it_can_be_asked(capsys):
    command.main(['--list'])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [*changes.STUDIES, *command.MODULES]
    for name in names:
        with pytest.raises(SystemExit):
            command.main([name, '--help'])
        assert f'scripts.studies.run {name}' in capsys.readouterr().out
    with pytest.raises(ValueError, match="Unknown study 'norm'. Nearest: norms"):
        command.main(['norm'])


def test_a_study_has_its_place_in_the_docs():
    for study in changes.STUDIES.values():
        page = (ROOT / 'docs' / study.page).read_text()
        assert all(f'<!-- {mark} -->' in page for mark in study.tables)
    page = ''.join((ROOT / 'docs' / name).read_text() for name in ('results.md', 'concepts/attended.md'))
    assert all(f'<!-- {name} -->' in page for name in command.MODULES if name != 'pathfinder')


def test_runs_that_are_recorded_are_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, 'ProcessPoolExecutor', lambda workers, *_, **__: ThreadPoolExecutor(workers))
    monkeypatch.setattr(trials, 'RESULTS', tmp_path)
    small = {'dataset': 'fake', 'model': 'test_linformer_vit', 'epochs': 0.25, 'stages': ((16, 1.0),)}

    def study(name, fields, again=False):
        return trials.Trials(name, flags(tmp_path, again=again), fields, 'runs.json', **small)

    ((first,),) = study('a', ('top1', 'seed')).run('fashion_mnist_pixels', {'one': {}}, [3]).values()
    other = study('b', ('top1', 'seed'))
    other.common['data_dir'] = tmp_path / 'there'
    ((second,),) = other.run('fashion_mnist_pixels', {'one': {}}, [3]).values()
    assert not (tmp_path / 'b').exists() and second == first and second['seed'] == 3
    record = other.record
    assert record.find(record.asked('fashion_mnist_pixels', 3, other.common)) is not None
    assert record.find(record.asked('fashion_mnist_pixels', 4, other.common)) is None
    assert record.find(record.asked('fashion_mnist_pixels', 3, {**other.common, 'epochs': 0.5})) is None
    again = study('a', ('images_seen',), again=True)
    again.run('fashion_mnist_pixels', {'one': {}}, [3])
    assert (tmp_path / 'a' / 'one_3' / 'earlier_1').is_dir() and len(again.record.read()) == 1
    assert 'images_seen' in again.record.read()[0]['found'] and 'top1' not in again.record.read()[0]['found']


def test_figures_of_one_folder_of_images_are_not_those_of_another(tmp_path):
    record = trials.Record(tmp_path / 'runs.json', ())
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
    one, two = (record.asked('finetune', 0, {'data_dir': tmp_path / name}) for name in ('one', 'two'))
    assert one != two and one == record.asked('finetune', 0, {'data_dir': tmp_path / 'one', 'output_dir': tmp_path})


def test_tables_show_means_spreads_and_distances():
    rows = {(256, FULL): runs(0.80, 0.82), (256, 'K = 16'): runs(0.83, 0.83, minutes=1.5) + runs(0.83, minutes=9.0)}
    assert attention.parity_table(rows, {FULL: 0.04, 'K = 16': 0.02}).splitlines()[2:] == [
        '| 256 | N, full attention | 0.04 | 81.0 ± 1.4 % | | 2.0 | 2 |',
        '| 256 | 16 | 0.02 | 83.0 ± 0.0 % | +2.0 | 1.5 | 3 |',
    ]
    lines = tables.table({'': lambda key, _: key, 'top-1': None, 'parameters': None}, {'one': runs(0.80)}).splitlines()
    assert lines == ['| | top-1 | parameters |', '| --- | --- | --- |', '| one | 80.0 % | 1,234 |']


def test_distances_are_seed_by_seed():
    rows = {(5, 'from scratch'): runs(0.80, 0.82, 0.81), (5, 'fine-tuned'): runs(0.83, 0.83, 0.87)}
    rates = {(5, 'from scratch'): 0.01, (5, 'fine-tuned'): 0.003}
    assert transfer.starts_table(transfer.EPOCHS, rows, rates).splitlines()[2:] == [
        '| 5 | from scratch | 0.01 | 81.0 ± 1.0 % | | 2.0 | 3 |',
        '| 5 | fine-tuned | 0.003 | 84.3 ± 2.3 % | +3.3 (s.e. 1.5) | 2.0 | 3 |',  # of 3, 1 and 6: 2.52 / √3
    ]


def test_a_study_leaves_its_figures_and_its_table_between_the_marks_of_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, 'DOCS', tmp_path)
    monkeypatch.setattr(tables, 'RESULTS', tmp_path / 'results')
    page = tmp_path / 'results.md'
    page.write_text('before\n<!-- a -->\nold\n<!-- /a -->\nafter\n')
    for _ in range(2):
        tables.publish('a', {'seeds': 1}, '| new |')
        assert page.read_text() == 'before\n<!-- a -->\n| new |\n<!-- /a -->\nafter\n'
    assert (tmp_path / 'results' / 'a.json').read_text() == '{\n  "seeds": 1\n}\n'
    with pytest.raises(ValueError, match='no place for the table: <!-- b -->'):
        tables.write_table('b', '')


def test_rates_are_chosen_on_images_that_no_run_learns_from(tmp_path, monkeypatch):
    monkeypatch.setattr(few_labels, 'CHOSEN_ON', 2)
    for file in [*(f'train/{c}/{i}.png' for c in 'ab' for i in range(5)), 'test/a/9.png', 'test/b/8.png']:
        (tmp_path / 'cifar10' / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'cifar10' / file).touch()

    def images(folder: Path) -> list[str]:
        return sorted(str(file.resolve().relative_to(tmp_path / 'cifar10')) for file in folder.rglob('*.png'))

    for _ in range(2):  # links of before are gone
        choice, test = few_labels.folders(tmp_path / 'cifar10', tmp_path, 3)
        learned = [f'train/{c}/{i}.png' for c in 'ab' for i in range(3)]
        assert images(choice / 'train') == images(test / 'train') == learned
        assert images(choice / 'val') == [f'train/{c}/{i}.png' for c in 'ab' for i in (3, 4)]
        assert images(test / 'val') == ['test/a/9.png', 'test/b/8.png']
    with pytest.raises(SystemExit, match='has 5 images; 4 to train on and 2 others are needed'):
        few_labels.folders(tmp_path / 'cifar10', tmp_path, 4)


def test_a_plain_network_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    def train_for(calls: float, **changes):
        """With a clock that goes on by a second at each call, and stops the training after some."""
        seconds = itertools.count()

        def process_time():
            if (now := next(seconds)) >= calls:
                raise KeyboardInterrupt
            return now

        monkeypatch.setattr(plain_cnn.time, 'process_time', process_time)
        return plain_cnn.train_cnn('fake', Path(), minutes=0.15, shift=1, **changes)

    monkeypatch.setattr(plain_cnn, 'SAVE_EVERY', 2)
    whole, state = train_for(99), tmp_path / 'state.pt'
    with pytest.raises(KeyboardInterrupt):
        train_for(6, state=state)
    assert train_for(99, state=state) == whole
    with pytest.raises(SystemExit, match='another training'):
        train_for(99, state=state, seed=1)


def test_the_plain_network_is_as_large_as_pico_and_learns():
    network = plain_cnn.plain_cnn(1, 10)
    assert sum(p.numel() for p in network.parameters()) == 202_073
    found = plain_cnn.train_cnn('fake', Path(), minutes=0.05)
    assert found['top1'] > 0.9 and found['num_samples'] == 100


def test_baselines_are_trained_once(tmp_path):
    found = model_card.baselines(tmp_path, 'fake', Path(), minutes=0.01)
    assert found == model_card.baselines(tmp_path, 'fake', Path(), minutes=100.0)
    assert found['softmax regression']['num_parameters'] == 2570


def test_rates_are_tried_until_those_next_to_the_best_are_worse(monkeypatch, tmp_path):
    peaks = {'from scratch': 1e-3, 'fine-tuned': 3e-2, 'linear probe': 3e-1}
    answering(monkeypatch, lambda name, own: {'val_top1': -abs(math.log(own['lr'] / peaks[name.partition(', lr')[0]]))})
    first = dict.fromkeys(peaks, transfer.neighbours(1e-2))
    own = trials.Trials('transfer', flags(tmp_path))
    best, scores = own.choose_rates('', dict.fromkeys(peaks, {}), first, transfer.neighbours)
    assert best == peaks
    assert list(scores['from scratch']) == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert list(scores['fine-tuned']) == [3e-3, 1e-2, 3e-2, 1e-1]
    assert list(scores['linear probe']) == [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]


def test_conversion_is_compared_at_the_rate_that_validation_chose_and_for_equal_minutes(tmp_path, monkeypatch):
    best, found = {'K = 64': 5e-4, 'K = 16': 2e-3}, {}

    def score(name, own):
        right = own.get('lr') == best.get(name[:6])
        return {'top1': 0.885, 'train_minutes': 3.25, 'seed': 0, 'val_top1': 0.9 if right else 0.8}

    asked = answering(monkeypatch, score)
    monkeypatch.setattr(
        conversion, 'convert', lambda name, own, settings: {'pooled': {'top1': 0.2}, 'fitted': {'top1': 0.5}}
    )
    monkeypatch.setattr(conversion, 'resolved', lambda recipe: recipe.replace(img_size=32))
    monkeypatch.setattr(conversion, 'publish', lambda name, result, text: found.update({name: text}))
    conversion.conversion(conversion.Settings(data_dir=tmp_path, output_dir=tmp_path))
    recipe, distilled = asked['K = 16, distilled']
    assert (recipe, distilled['lr'], asked['K = 64, distilled'][1]['lr']) == ('distill_from_vit', 2e-3, 5e-4)
    assert distilled['init'] != distilled['teacher'] == str(tmp_path / 'conversion/teacher_0')
    recipe, scratch = asked['K = 16, from scratch']
    assert recipe == 'fashion_mnist_vit' and scratch['max_minutes'] == 3.25
    assert 'init' not in scratch and scratch['stages'] == ((32, 1.0),)
    assert {own['val_fraction'] for _, own in asked.values()} == {0.05}  # the same slice, unseen by the teacher too
    assert found['conversion'].splitlines()[2:] == [
        '| N, the teacher | 88.5 % | | | | |',
        '| 64 | 20.0 % | 50.0 % | 88.5 % | 88.5 % | 3.2 |',
        '| 16 | 20.0 % | 50.0 % | 88.5 % | 88.5 % | 3.2 |',
    ]


def test_a_conversion_is_fitted_kept_and_taught_without_the_validation_slice(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, 'evaluate', lambda model, batches, size: {'top1': 0.5})
    settings = conversion.Settings(dataset='fake', data_dir=tmp_path, output_dir=tmp_path, steps=2)
    own = trials.Trials('conversion', settings)
    recipe = trials.changed_recipe('fashion_mnist_vit', 0, {}).to_dict()
    teacher = timm.create_model(recipe['model'], img_size=32, in_chans=1, num_classes=10, **recipe['model_args'])
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': (0.5,), 'std': (0.5,), 'crop_pct': 1.0}
    save_for_hf(teacher, str(trials.run_folder(own.folder, 'teacher', 0)), safe_serialization=True)
    found = conversion.convert('K = 64', own, settings)
    assert found == conversion.convert('K = 64', own, settings) and len(found['attention_error']) == 2
    settings.steps = 3
    with pytest.raises(ValueError, match="'steps': 2}, not .*'steps': 3}: name another --output-dir"):
        conversion.convert('K = 64', own, settings)
    images = ImagesOf(teacher, 'fake', tmp_path, 32, torch.device('cpu'))
    slice_ = split_validation(create_dataset('fake', tmp_path, 'train'), 0.05, 0)[1]
    assert len(slice_) == 13 and images.batches('train', without=0.05).order.n == 256 - 13
    fields = conversion.from_scratch('K = 64', own, 1.0)
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


def test_how_alike_maps_are_is_the_mean_correlation_of_pairs():
    maps = torch.randn(4, 3, 5, dtype=torch.float64)
    wanted = torch.corrcoef(maps.flatten(1))[*torch.triu_indices(4, 4, 1)].mean()
    assert attended.likeness(maps) == pytest.approx(wanted.item())


@pytest.mark.parametrize('kind', ['separable', 'dynamic'])
def test_rows_of_e_and_maps_are_those_of_each_image(kind):
    model = timm.create_model('test_linformer_vit', img_size=8, projection=kind, proj_len=4).eval()
    E, maps = attended.look(model, 3 * torch.randn(5, 3, 8, 8))
    assert E.shape == (5, 4, 64) and maps.shape == (5, 8, 8)
    assert bool(E.std(0).max() < 1e-6) == (kind == 'separable')
    rows = attended.most_different(E)
    size = E[0].norm(dim=-1) if kind == 'separable' else E.std(0).sum(-1)
    assert sorted(rows.tolist()) == rows.tolist() and size[rows].min() == size.sort().values[-3]
