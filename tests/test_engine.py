"""What a run keeps safe, and what follows a model through its stages."""

import errno
import json
import subprocess
import sys

import pytest
import timm
import torch
from runs import CPU, events, small, weights

from linvision.data import create_batches, create_dataset
from linvision.train import Recipe, checkpoint, train
from linvision.train.learner import Learner
from linvision.train.model import create_model
from linvision.train.optimizer import create_optimizer
from linvision.train.parallel import Processes


@pytest.fixture
def recipe(small_recipe):
    return small_recipe.replace(epochs=1.25, lr=3e-3)  # 10 steps


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights that the recipe gives."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train(small(folder, epochs=1.25, lr=3e-3, test=False))
    return weights(folder)


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def steps(folder) -> list[str]:
    return sorted(p.name for p in (folder / 'checkpoints').iterdir())


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    'damage',
    [
        'a flipped bit',
        *(pytest.param(d, marks=pytest.mark.slow) for d in ('truncated', 'a missing file', 'no checksums')),
    ],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(whole, recipe, damage, capsys):
    parts = recipe.replace(checkpoint_every=3, test=False)
    train(parts.replace(max_steps=6))
    assert steps(parts.run.output_dir) == ['step_00000003', 'step_00000006']
    last = parts.run.output_dir / 'checkpoints/step_00000006'
    content = bytearray((last / 'state.pt').read_bytes())
    if damage == 'truncated':
        (last / 'state.pt').write_bytes(content[: len(content) // 2])
    elif damage == 'a flipped bit':
        content[len(content) // 2] ^= 1  # in a tensor: torch.load would not notice
        (last / 'state.pt').write_bytes(content)
    elif damage == 'a missing file':
        (last / 'state.pt').unlink()
    else:
        (last / 'checksums.json').unlink()
    train(parts)
    assert 'step_00000006 is damaged' in capsys.readouterr().out
    assert same(weights(parts.run.output_dir), whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over_by_itself(recipe):
    train(recipe.replace(max_steps=3))
    (recipe.run.output_dir / 'checkpoints/step_00000003/state.pt').write_bytes(b'damaged')
    for _ in range(2):  # as torchrun would, with --max-restarts
        with pytest.raises(ValueError, match='All checkpoints in .* are damaged.*--fresh'):
            train(recipe)
    assert train(recipe.replace(fresh=True, test=False))['steps'] == 10


def test_the_last_checkpoints_and_the_best_on_the_validation_slice_are_kept(recipe):
    kept = train(recipe.replace(epochs=3, stages=((8, 1.0),), val_fraction=0.25, eval_every=0.5, checkpoint_every=1))
    best = f'step_{kept["best_step"]:08d}'
    assert best in steps(recipe.run.output_dir) and len(steps(recipe.run.output_dir)) <= 3
    curve = events(recipe.run.output_dir).Scalars('val/top1')
    assert kept['best_val_top1'] == pytest.approx(max(p.value for p in curve[:-1]))
    assert [(p['step'], p['top1']) for p in kept['val_curve']] == [(p.step, pytest.approx(p.value)) for p in curve[:-1]]


def test_a_full_disk_is_named_and_the_checkpoints_before_it_stay(recipe, monkeypatch):
    recipe = recipe.replace(test=False)
    train(recipe.replace(max_steps=3))

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(checkpoint.torch, 'save', full)
    with pytest.raises(OSError, match='step 10 cannot be written.*No space left.*GiB are free'):
        train(recipe)
    assert steps(recipe.run.output_dir) == ['step_00000003']


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_changed(recipe, tmp_path):
    train(recipe.replace(max_steps=3))
    path = recipe.run.output_dir / 'checkpoints/step_00000003/state.pt'
    state = torch.load(path, weights_only=True)
    del state['learner']['model']['blocks.0.attn.qkv.weight']
    torch.save(state, path)
    sums = path.parent / 'checksums.json'
    sums.write_text(json.dumps({'state.pt': checkpoint.digest(path)}))
    with pytest.raises(ValueError, match='checkpoint of another model'):
        train(recipe)
    assert steps(recipe.run.output_dir) == ['step_00000003']


def test_fresh_starts_over_and_keeps_what_is_there(recipe):
    recipe = recipe.replace(epochs=0.25, stages=((8, 1.0),))
    first = train(recipe)
    other = recipe.replace(lr=1e-3, fresh=True)
    with pytest.raises(ValueError, match='--fresh'):
        train(other.replace(fresh=False))
    second = train(other)
    assert second['loss'] != first['loss']
    assert json.loads((recipe.run.output_dir / 'earlier_1/metrics.json').read_text()) == json.loads(json.dumps(first))
    train(other.replace(lr=2e-3))
    assert (recipe.run.output_dir / 'earlier_2/model').is_dir() and (recipe.run.output_dir / 'earlier_1/model').is_dir()


def test_a_folder_in_which_another_process_runs_is_refused(recipe):
    recipe = recipe.replace(epochs=0.25, test=False)
    recipe.run.output_dir.mkdir()
    hold = 'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.lockf(f, fcntl.LOCK_EX); print("held"); input()'
    command = [sys.executable, '-u', '-c', hold, str(recipe.run.output_dir / '.lock')]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(OSError, match='Another process is running'):
            train(recipe)
        other.communicate('\n')
    assert train(recipe)['steps'] == 2


def test_memory_that_does_not_suffice_names_what_to_change(recipe, monkeypatch):
    def exhausted(self, *args):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(Learner, 'update', exhausted)
    words = '32 images at a time of 64 tokens each, after 0 steps.*--accumulate 2 .*--chunk-size.*--grad-checkpointing'
    with pytest.raises(MemoryError, match=words):
        train(recipe)


def test_a_dry_run_says_what_will_happen_and_writes_nothing(recipe, capsys):
    assert train(recipe.replace(dry_run=True)) == {}
    out = capsys.readouterr().out
    assert not recipe.run.output_dir.exists()
    length, batch = '10 steps, 1.25 passes over the images', '32 images = 1 processes × 1 parts × 32'
    for words in (length, batch, '64 tokens', '256 tokens'):
        assert words in out, out
    assert 'one step of 32 images of 16×16 pixels taken' in out


@pytest.mark.parametrize(
    'name, limit, kept, arguments',  # numbers for each token and channel
    [
        ('test_linformer_vit', 2**40, 24 * 3, {}),
        ('test_linformer_vit', 0, 3 + 3, {}),
        ('test_linformer_vit', 0, 3 + 5, {'token_norm': True}),
        pytest.param('test_vit', 0, 24 * 6, {'patch_size': 1}, marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_knows_when_blocks_are_streamed(recipe, monkeypatch, capsys, name, limit, kept, arguments):
    monkeypatch.setattr('linvision.streaming.chunk_size.whole_bytes', lambda device: limit)
    train(recipe.replace(dry_run=True, batch_size=128, model=name, model_args=arguments))
    model = timm.create_model(name, img_size=16, in_chans=1, num_classes=10, **arguments)
    parameters = sum(p.numel() for p in model.parameters())
    expected = 4 * (4 * parameters + 128 * 256 * model.embed_dim * kept) / 2**30
    assert f'{expected:.2f} GiB above the data' in capsys.readouterr().out


def test_a_dry_run_fetches_nothing(recipe, tmp_path):
    recipe = recipe.replace(dataset='fashion_mnist', data_dir=tmp_path / 'data', dry_run=True)
    with pytest.raises(FileNotFoundError, match='download is switched off, as in a dry run'):
        train(recipe)
    assert not (tmp_path / 'data').exists()


def test_an_epoch_is_as_many_images_as_the_set_has(recipe):
    metrics = train(recipe.replace(epochs=3, batch_size=100, test=False))  # of 256: two full batches in an order
    assert metrics['steps'] == 8 and metrics['epochs'] == 8 * 100 / 256


def test_a_run_without_stages_takes_the_size_that_is_asked_for(recipe):
    assert train(recipe.replace(stages=(), img_size=12, epochs=0.25, test=False))['tokens'] == 144
    with pytest.raises(ValueError, match=r'img_size is for runs without stages, .*--stages 12 1 instead'):
        train(recipe.replace(img_size=12))


# --------------------------------------------------------------------------------------------------------------- stages


def test_what_a_boundary_replaces_keeps_training_and_the_rest_keeps_its_moments():
    recipe = Recipe().replace(model='test_linformer_vit', model_args={'pos_embed': 'separable'}, ema_decay=0.5, lr=1e-2)
    shape = {'in_chans': 1, 'num_classes': 10}
    torch.manual_seed(0)
    learner = Learner(recipe, shape, 8, 16, 100, (0.5,), (0.5,), Processes(torch.device('cpu')))
    learner.start('fp32')
    labels = torch.arange(8)
    learner.update(torch.randn(8, 1, 8, 8), labels, 0.1, 0)
    moments = {n: learner.optimizer.state[p] for n, p in learner.model.named_parameters()}
    learner.set_size(16)
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    average = {n: p.detach().clone() for n, p in learner.ema.named_parameters()}
    present = dict(learner.model.named_parameters())
    replaced = {n for n, p in present.items() if p not in learner.optimizer.state}
    assert replaced == {'position.row', 'position.column', *(n for n in present if n.startswith('projection.'))}
    for name in present.keys() - replaced:
        assert learner.optimizer.state[present[name]] is moments[name]
    learner.update(torch.randn(8, 1, 16, 16), labels, 0.2, 1)
    for name in replaced:
        assert not torch.equal(before[name], present[name]), name
        assert not torch.equal(average[name], dict(learner.ema.named_parameters())[name]), name


@pytest.mark.parametrize('proj_len, unused', [(64, True), (16, False)])
def test_a_projection_that_was_not_used_before_the_image_grew_starts_as_the_mean_of_cells(proj_len, unused):
    recipe = Recipe().replace(model='test_linformer_vit', model_args={'proj_len': proj_len}, ema_decay=0.5)
    learner = Learner(recipe, {'in_chans': 1, 'num_classes': 10}, 8, 16, 100, (0.5,), (0.5,), Processes(CPU))
    learner.start('fp32')
    learner.set_size(16)
    pooled = timm.create_model('test_linformer_vit', img_size=16, in_chans=1, num_classes=10,
                               proj_len=proj_len, projection='mean_pool')  # fmt: skip
    images = torch.randn(2, 1, 16, 16)
    for model in (learner.model, learner.ema):
        pooled.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('projection.')})
        close = torch.allclose(model.eval()(images), pooled.eval()(images), rtol=1e-4, atol=1e-5)
        assert close == unused


def test_a_last_stage_too_short_for_a_step_is_still_what_is_scored(recipe):
    metrics = train(recipe.replace(stages=((8, 0.99), (16, 0.01))))
    assert metrics['tokens'] == 256 and metrics['steps'] == 10


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize('change', [{'accumulate': 4}, {'grad_checkpointing': True}, {'chunk_size': 4096}])
def test_ways_to_save_memory_give_the_same_weights(whole, recipe, change):
    train(recipe.replace(test=False, **change))
    torch.testing.assert_close(weights(recipe.run.output_dir), whole, rtol=1e-3, atol=2e-5)


def test_layer_decay_scales_the_rate_by_depth():
    recipe = Recipe().replace(model='test_linformer_vit', layer_decay=0.5, lr=1.0)
    model = create_model(recipe, {'in_chans': 1, 'num_classes': 10}, 16)
    optimizer = create_optimizer(recipe.optim, model)
    depth = len(model.blocks)
    scale = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    expected = {
        'head.weight': 1.0,
        'blocks.0.mlp.fc1.weight': 0.5**depth,
        'patch_embed.proj.weight': 0.5 ** (depth + 1),
    }
    for name, value in expected.items():
        assert scale[id(model.get_parameter(name))] == value, name


def test_a_student_with_a_teacher_alone_comes_near_to_it(recipe, tmp_path):
    teacher = recipe.replace(epochs=5, output_dir=tmp_path / 'teacher', stages=((8, 1.0),), test=False)
    train(teacher)
    agreement = []
    for weight in (0.0, 1.0):
        student = teacher.replace(
            output_dir=tmp_path / f'student_{weight}', epochs=2, lr=1e-2, seed=1,
            teacher=str(teacher.run.output_dir / 'model'), teacher_weight=weight,
        )  # fmt: skip
        train(student)
        images = create_batches(create_dataset('fake', '.', 'test'), 100, (0.2,), (0.2,), CPU)
        batch, _ = next(images.ordered(8))
        one, two = (
            timm.create_model(f'local-dir:{r.run.output_dir}/model', pretrained=True).eval()(batch).log_softmax(-1)
            for r in (teacher, student)
        )
        agreement.append((one.exp() * (one - two)).sum(-1).mean().item())  # KL divergence
    assert agreement[1] < 0.7 * agreement[0]


@pytest.mark.slow
def test_a_compiled_run_gives_the_same_weights(whole, recipe):
    train(recipe.replace(compile='on', test=False))
    torch.testing.assert_close(weights(recipe.run.output_dir), whole, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- tensorboard


def test_tensorboard_holds_what_a_run_shows(recipe, with_pictures):
    train(recipe.replace(stages=((8, 1.0),), val_fraction=0.25, eval_every=0.5, log_every=2))
    board = events(recipe.run.output_dir)
    tags = board.Tags()
    wanted = {f'{split}/{name}' for split in ('train', 'val', 'test') for name in ('loss', 'top1', 'top5')}
    wanted |= {'train/lr', 'train/grad_norm', 'speed/images_per_s', 'speed/tokens_per_s', 'speed/waiting_for_data'}
    assert wanted | {'memory/peak_gib', 'final/top1'} <= set(tags['scalars'])
    assert {'train/batch', 'test/misclassified', 'test/attention'} <= set(tags['images'])
    assert 'weights/blocks.0.attn.qkv.weight' in tags['histograms']
    assert '"lr": 0.003' in board.Tensors('recipe/text_summary')[0].tensor_proto.string_val[0].decode()
    assert all(0 <= p.value <= 1 for p in board.Scalars('speed/waiting_for_data'))


def test_a_run_that_is_stopped_where_it_is_to_be_scored_is_scored_when_it_goes_on(recipe):
    recipe = recipe.replace(stages=((8, 1.0),), epochs=3, val_fraction=0.25, eval_every=1.0, test=False)
    wanted = [point['step'] for point in train(recipe.replace(output_dir=recipe.run.output_dir / 'whole'))['val_curve']]
    stopped = recipe.replace(output_dir=recipe.run.output_dir / 'stopped')
    assert train(stopped.replace(max_steps=wanted[0])) == {}
    found = train(stopped)['val_curve']
    assert [point['step'] for point in found] == wanted and len(wanted) == 3
