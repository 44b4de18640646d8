"""Runs on images in their own shape: how they are read and grouped, what a step learns, what a run leaves behind."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from runs import CPU, small, weights

from linvision.cli import evaluate
from linvision.cli.predict import predict
from linvision.data import Augmentation, create_batches, create_dataset
from linvision.data.image_file import read_image
from linvision.data.native_sizes import NativeSizes, NativeTransform, OrderBySize
from linvision.models.mixed_sizes import collate
from linvision.train import train
from linvision.train.learner import Learner
from linvision.train.model import resolved
from linvision.train.parallel import Processes

SHAPES = [(8, 12), (12, 8), (10, 10)]  # height and width
SIZES = NativeSizes((1, 1), 144)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Grey images of three shapes in two classes, whose upper or lower half is bright: 24, and 9 for the test."""
    folder = tmp_path_factory.mktemp('shapes')
    torch.manual_seed(0)
    for split, n in (('train', 12), ('val', 5)):
        for label in ('lower', 'upper'):
            (folder / split / label).mkdir(parents=True)
            for i in range(n - (split == 'val' and label == 'upper')):
                height, width = SHAPES[i % 3]
                pixels = torch.randint(0, 96, (height, width), dtype=torch.uint8)
                pixels[slice(height // 2) if label == 'upper' else slice(height // 2, None)] += 128
                Image.fromarray(pixels.numpy()).save(folder / split / label / f'{i}.png')
    return folder


@pytest.fixture
def recipe(folder, tmp_path):
    settings = dict(dataset='image_folder', data_dir=folder, stages=(), batch_size=5, native_sizes=True)
    return small(tmp_path / 'run', **settings)


# -------------------------------------------------------------------------------------------------- images and batches


@pytest.mark.parametrize('patch, most', [((1, 1), 144), ((1, 1), 4096), ((4, 4), 256), ((16, 8), 196)])
def test_sides_are_rounded_up_and_no_image_has_too_many_tokens(patch, most):
    sizes = NativeSizes(patch, most)
    for height, width in [(8, 12), (100, 30), (3000, 4000), (1, 5000), (4000, 7), (37, 61)]:
        (h, w), (rows, columns) = sizes.size(height, width), sizes.grid(height, width)
        cell = (patch[0] * sizes.step, patch[1] * sizes.step)
        assert rows * columns <= most and h % cell[0] == w % cell[1] == 0
        assert (h // patch[0], w // patch[1]) == (rows, columns)
        whole = (-(-height // cell[0]) * cell[0], -(-width // cell[1]) * cell[1])
        if whole[0] * whole[1] <= most * patch[0] * patch[1]:  # it fits as it is
            assert (h, w) == whole
        else:
            assert h < whole[0] or w < whole[1]
            # one scale of which both sides are rounded up
            lower = max((h - cell[0]) / height, (w - cell[1]) / width)
            assert lower <= min(h / height, w / width) * (1 + 1e-6)


def test_an_image_is_seen_whole_and_a_crop_of_it_has_its_size():
    image = Image.effect_noise((12, 8), 60)
    whole = NativeTransform(SIZES, Augmentation(), (0.5,))(image)
    assert torch.equal(whole[0], torch.from_numpy(np.array(image)))
    change = NativeTransform(SIZES, Augmentation(crop_scale=(0.5, 0.9), hflip=0.5, shift=1), (0.5,))
    crops = [change(image, seed) for seed in (1, 1, 2)]
    assert {crop.shape for crop in crops} == {(1, 8, 12)}
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])


def test_a_photograph_that_lies_is_grouped_as_it_is_read(tmp_path):
    (tmp_path / 'one').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('L', (12, 8)).save(tmp_path / 'one/0.jpg', exif=exif)
    images = create_dataset('image_folder', tmp_path, 'all')
    batches = create_batches(images, 1, (0.5,), (0.5,), CPU, native=SIZES)
    ((batch, _),) = batches.ordered(12)
    assert batches.order.grids == [(12, 8)] and batch['patch_coord'].amax((0, 1)).tolist() == [11, 7]


@pytest.mark.parametrize('count', [1, 2])
def test_batches_are_alike_in_size_and_an_epoch_has_no_image_twice(count):
    generator = torch.Generator().manual_seed(0)
    grids = [SHAPES[i] for i in torch.randint(3, (50,), generator=generator).tolist()]
    shares = [OrderBySize(grids, 8, rank, count) for rank in range(count)]
    streams, epochs = [order.shuffled(7, 0) for order in shares], []
    for _ in range(2):
        batches = [torch.cat([next(stream)[2] for stream in streams]) for _ in range(6)]
        assert len(torch.cat(batches).unique()) == 48
        assert sum(len({grids[i] for i in batch.tolist()}) for batch in batches) <= 6 + 2
        epochs.append(torch.cat(batches))
    assert not torch.equal(*epochs)
    later = [order.shuffled(7, 8) for order in shares]  # as resumed in the middle of the second epoch
    assert torch.equal(torch.cat([next(stream)[2] for stream in later]), epochs[1][16:24])
    scored = torch.cat([index[counts] for order in shares for index, counts in order.in_order()])
    assert sorted(scored.tolist()) == list(range(50))


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize('accumulate', [1, 3])
def test_the_loss_of_a_step_is_that_of_the_images_one_by_one(recipe, accumulate):
    recipe = resolved(recipe.replace(batch_size=6, accumulate=accumulate))
    learner = Learner(recipe, {'in_chans': 1, 'num_classes': 2}, 12, 12, 10, (0.5,), (0.5,), Processes(CPU))
    learner.model.double()
    learner.start('fp32')
    samples = [(torch.randn(1, *SHAPES[i % 3], dtype=torch.float64), i % 2) for i in range(6)]
    batch, labels = collate(samples, (1, 1))
    logits = torch.cat([learner.model(image.unsqueeze(0)) for image, _ in samples])
    alone = [F.cross_entropy(logits[i], labels[i]) for i in range(6)]
    expected = torch.stack(alone).mean()
    gradients = torch.autograd.grad(expected, list(learner.model.parameters()))
    loss, norm, logits = learner.update(batch, labels, 0.5, 0)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradients]).norm())
    assert len(logits) == 6


def test_a_run_learns_is_scored_by_every_image_once_and_is_used_by_its_folder(recipe, folder, capsys):
    metrics = train(recipe.replace(epochs=6, opt='muon', lr=0.01, val_fraction=0.2, eval_every=3, eval_batch_size=4))
    assert metrics['top1'] == 1 and metrics['num_samples'] == 9 and metrics['val_num_samples'] == 5
    assert metrics['tokens'] < 100 and len(metrics['val_curve']) == 2
    note = 'at most 100 tokens each, sides rounded up to 1 pixels: 3 sizes'
    assert note in capsys.readouterr().out
    evaluate.main(str(recipe.run.output_dir), batch_size=4, device='cpu', as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert all(found[name] == metrics[name] for name in ('top1', 'loss', 'num_samples'))

    model = timm.create_model(f'local-dir:{recipe.run.output_dir}/model', pretrained=True).eval()
    paths = sorted((folder / 'val').rglob('*.png'))
    with torch.inference_mode():
        said = predict(model, paths, topk=2, batch_size=4)
        losses = []
        for path, each in zip(paths, said, strict=True):
            pixels = NativeTransform(NativeSizes.of(model), Augmentation(), (0.5,))(read_image(path, 1))
            config = model.pretrained_cfg
            logits = model((pixels.unsqueeze(0) / 255 - config['mean'][0]) / config['std'][0])
            label = metrics['classes'].index(path.parent.name)
            losses.append(F.cross_entropy(logits, torch.tensor([label])).item())
            best = each['classes'][0]
            assert best['probability'] == pytest.approx(logits.softmax(-1)[0, best['label']].item(), rel=1e-4)
    assert sum(losses) / 9 == pytest.approx(metrics['loss'], rel=1e-4)


def test_a_dry_run_takes_the_batch_of_the_most_tokens(recipe, capsys):
    assert train(recipe.replace(dry_run=True, seed=3)) == {}
    assert 'one step of 5 images of at most 100 tokens, the largest of an epoch, taken' in capsys.readouterr().out
    order = OrderBySize([(3, 3), (9, 9), (3, 3), (9, 9)], 2)
    step, tokens = order.largest(3)
    assert tokens == 81 and order.permutation(3, 0)[2 * step : 2 * step + 2].sort().values.tolist() == [1, 3]


def test_a_run_that_is_stopped_goes_on_to_the_same_model(recipe, tmp_path):
    recipe = recipe.replace(epochs=1.2, hflip=0.5, crop_scale=(0.5, 1.0), test=False, val_fraction=0.1)
    train(recipe)
    parts = recipe.replace(output_dir=tmp_path / 'parts')
    assert train(parts.replace(max_steps=3)) == {}
    train(parts)
    whole, resumed = weights(recipe.run.output_dir), weights(parts.run.output_dir)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(stages=((8, 0.5), (12, 0.5))), r'Leave out --stages, which are squares \(say --img-size\)'),
        (dict(mixup=0.2, batch_size=4), 'Leave out --mixup and --cutmix, which need images of one size'),
        (dict(task='masked_pixels'), 'Leave out --task masked_pixels'),
        (dict(crop_mode='border'), 'Leave out --crop-mode border'),
        (dict(teacher='somewhere'), 'Leave out --teacher'),
        (dict(parallel='sequence'), r'Leave out --parallel sequence \(say ddp\)'),
        (dict(parallel='fsdp', compile='on'), r'--parallel fsdp \(say ddp\); --compile on'),
        (dict(model='vit_tiny_patch16_224'), 'only linformer_vit_. models take such batches'),
        (dict(augmentation='kornia', hflip=0.5), 'say --augmentation torchvision'),
        (dict(dataset='fake'), 'leave out --native-sizes'),
    ],
)
def test_what_does_not_go_with_native_sizes_is_named(recipe, changes, words):
    with pytest.raises(ValueError, match=words):
        train(recipe.replace(**changes))


def test_a_damaged_image_is_named_or_left_out(folder, tmp_path):
    shutil.copytree(folder / 'val', tmp_path / 'images')
    (tmp_path / 'images/upper/1.png').write_bytes(b'no image')
    images = create_dataset('image_folder', tmp_path / 'images', 'all')
    stopping, skipping = (
        create_batches(images, 4, (0.5,), (0.5,), CPU, native=SIZES, on_bad_image=how) for how in ('stop', 'skip')
    )
    with pytest.raises(OSError, match=r'upper/1.png cannot be read as an image .*--on-bad-image skip'):
        list(stopping.ordered(12))
    labels = torch.cat([labels for _, labels in skipping.ordered(12)])
    assert sorted(labels.tolist()) == [-1, 0, 0, 0, 0, 0, 1, 1, 1]
