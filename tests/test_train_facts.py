"""Further facts of a run: what resumes, what is scored, what precision it takes, what the board leaves behind."""

import sys

import pytest
import timm
import torch
from runs import events

from linvision.data import ImageSet, create_dataset, datasets
from linvision.train import train
from linvision.train.checkpoint import newest_checkpoint, read_state, seal
from linvision.train.model import compile_blocks
from linvision.train.parallel import Processes
from linvision.train.precision import choose_precision, matmul_precision_kept, use_tf32


@pytest.fixture
def recipe(small_recipe):
    return small_recipe.replace(epochs=1, lr=3e-3, model_args={'drop_rate': 0.1, 'drop_path_rate': 0.1})


def last(folder):
    state = read_state(newest_checkpoint(folder / 'checkpoints'))
    return state['progress'], state['learner']


def test_an_interrupted_run_with_dropout_mixing_and_a_moving_average_ends_the_same(recipe, tmp_path):
    recipe = recipe.replace(test=False, ema_decay=0.9, mixup=0.2, cutmix=1.0, opt='muon', shift=1, hflip=0.5, epochs=2)
    train(recipe)
    parts = recipe.replace(output_dir=tmp_path / 'parts')
    for stop in (3, 11, 0):
        train(parts.replace(max_steps=stop))
    (at, whole), (resumed_at, resumed) = last(recipe.run.output_dir), last(parts.run.output_dir)
    for part in ('model', 'ema'):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(whole[part][k], resumed[part][k]) for k in whole[part])
    assert at['tokens'] == resumed_at['tokens']


def test_a_run_that_died_before_its_metrics_scores_again_without_training(recipe):
    recipe = recipe.replace(stages=((8, 1.0),))
    metrics = train(recipe)
    (recipe.run.output_dir / 'metrics.json').unlink()
    again = train(recipe)
    for name in ('top1', 'loss', 'steps', 'train_minutes', 'tokens_per_s'):
        assert again[name] == metrics[name]


def test_a_checkpoint_of_another_version_is_a_sentence_and_stays_as_it_is(recipe):
    train(recipe.replace(max_steps=1))
    path = newest_checkpoint(recipe.run.output_dir / 'checkpoints')
    state = read_state(path)
    state['position'] = state.pop('progress')
    torch.save(state, path / 'state.pt')
    (path / 'checksums.json').unlink()
    seal(path)
    with pytest.raises(ValueError, match='step_00000001 is of another version of linvision.*--fresh'):
        train(recipe)
    assert newest_checkpoint(recipe.run.output_dir / 'checkpoints') == path


def test_three_classes_have_no_top5(recipe, monkeypatch):
    def three(root, split, download):
        images = create_dataset('fake', root, split)
        return ImageSet(images.images.expand(-1, 3, -1, -1).contiguous(), images.labels % 3, ('a', 'b', 'c'), 16)

    monkeypatch.setitem(datasets.DATASETS, 'three', three)
    metrics = train(recipe.replace(dataset='three', eval_batch_size=7, epochs=0.2))
    assert 'top5' not in metrics and metrics['num_samples'] == 100


@pytest.mark.parametrize('has', [(), ('avx512_bf16',), ('amx_bf16', 'avx512_bf16'), ('bf16',)])
def test_precision_is_what_the_processor_is_built_for(monkeypatch, has):
    monkeypatch.setattr(
        torch.cpu, 'get_capabilities', lambda: {'avx2': True, 'amx_bf16': False} | dict.fromkeys(has, True)
    )
    one = Processes(torch.device('cpu'))
    precision, why = choose_precision('auto', one)
    assert precision == ('bf16' if has else 'fp32') and (has[0] if has else 'no instructions for bf16') in why
    assert choose_precision('fp32', one) == ('fp32', '')
    assert choose_precision('bf16', one)[0] == precision


@pytest.mark.parametrize('capability, precision', [((7, 5), 'fp32'), ((8, 0), 'bf16'), ((9, 0), 'bf16')])
def test_precision_is_what_the_card_is_built_for(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a card')
    assert choose_precision('auto', Processes(torch.device('cuda', 0)))[0] == precision


@pytest.mark.parametrize(
    'device, precision, capability, uses',
    [
        ('cuda', 'fp32', (8, 0), True),
        ('cuda', 'fp32', (7, 5), False),
        ('cuda', 'bf16', (9, 0), False),
        ('cpu', 'fp32', (9, 0), False),
    ],
)
def test_fp32_products_are_in_tf32_where_the_card_has_it_and_it_is_said(
    monkeypatch, device, precision, capability, uses
):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a card')
    before = torch.get_float32_matmul_precision()
    with matmul_precision_kept():
        said = use_tf32(precision, torch.device(device))
        assert (torch.get_float32_matmul_precision() == 'high') == uses == ('TF32, which a card has' in said)
    assert torch.get_float32_matmul_precision() == before


def test_blocks_are_compiled_as_told_and_by_default_on_cuda(monkeypatch, recipe):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    for wanted, device, compiles in (
        ('auto', 'cuda', True), ('auto', 'cpu', False), ('on', 'cpu', True), ('off', 'cuda', False)
    ):  # fmt: skip
        model = timm.create_model('test_linformer_vit', chunk_size=64)
        assert compile_blocks(model, wanted, torch.device(device)) == compiles
        assert {block.compiles for block in model.blocks} == {'inductor' if compiles else ''}
        assert model.chunk_size == 64  # streamed as before
    assert not compile_blocks(timm.create_model('test_vit'), 'auto', torch.device('cuda'))
    assert type(recipe).from_dict({'compile': True}).run.compile == 'on'


def test_processes_agree_on_a_precision_that_all_have(monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'amx_bf16': True})
    monkeypatch.setattr(Processes, 'largest', lambda self, *values: [1.0])  # another one lacks it
    assert choose_precision('auto', Processes(torch.device('cpu')))[0] == 'fp32'


def test_a_run_says_its_precision_and_why(recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'architecture': 'an old one'})
    assert train(recipe.replace(precision='auto', epochs=0.2, test=False))['precision'] == 'fp32'
    assert 'fp32, since the processor has no instructions for bf16' in capsys.readouterr().out


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(recipe, monkeypatch, capsys):
    recipe = recipe.replace(log_every=2, epochs=0.25, test=False)
    train(recipe)
    lines = capsys.readouterr().out
    assert 'loss' in lines and 'images/s' in lines and 'min left' in lines and '\r' not in lines
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    train(recipe.replace(seed=1, output_dir=recipe.run.output_dir.with_name('tty')))
    shown = capsys.readouterr()
    assert '\r' in shown.err and 'images/s' in shown.err and 'min left' in shown.err


def test_tensorboard_holds_scalars_a_batch_and_the_recipe(recipe):
    train(recipe.replace(log_every=2))
    board = events(recipe.run.output_dir)
    tags = board.Tags()
    assert {
        'train/loss',
        'train/lr',
        'train/grad_norm',
        'test/top1',
        'test/top5',
        'test/loss',
        'speed/images_per_s',
    } <= set(tags['scalars'])
    assert 'train/batch' in tags['images'] and any('recipe' in t for t in tags['tensors'])
    assert [e.step for e in board.Scalars('train/loss')] == [2, 4, 6, 8]
