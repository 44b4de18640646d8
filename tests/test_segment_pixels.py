"""Scenes of overlapping items: what they are made of, how they are scored, and that a run of both networks learns."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import segment_pixels
from linvision.data import ImageSet
from linvision.guard import Mistake
from scripts.studies import segmentation
from segment_pixels import Scenes, Settings, intersection_over_union, network


@pytest.fixture
def items():
    """Ten flat items of 28×28, item i of class i and of its own brightness."""
    images = (60 + 15 * torch.arange(10, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(10, 1, 28, 28)
    return ImageSet(images.contiguous(), torch.arange(10), tuple(f'item {i}' for i in range(10)), 32)


@pytest.fixture
def colours():
    """Ten flat items of 32×32 in colour, item i of class i."""
    images = (20 * torch.arange(10, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(10, 3, 32, 32)
    return ImageSet(images.contiguous(), torch.arange(10), tuple(f'item {i}' for i in range(10)), 32)


def test_the_class_of_a_pixel_is_that_of_the_item_on_top(items):
    brightness = torch.cat([torch.zeros(1), (60 + 15 * torch.arange(10)) / 255])
    for i in range(20):
        pixels, classes = Scenes(items, 'clothes', 64).scene(i, 7)
        torch.testing.assert_close(pixels[0], brightness[classes])
        assert 1 <= len(classes[classes > 0].unique()) <= 5


def test_objects_are_discs_on_grey(colours):
    brightness = torch.cat([torch.tensor([0.5]), 20 * torch.arange(10) / 255])
    pixels, classes = Scenes(colours, 'objects', 64).scene(3, 7)
    assert pixels.shape == (3, 64, 64)
    torch.testing.assert_close(pixels, brightness[classes].expand(3, -1, -1))
    covered = segment_pixels.disc(32)
    assert covered.sum() == pytest.approx(3.1416 * 16**2, rel=0.02) and not covered[0, 0] and covered[0, 16]


def test_the_corners_decide_on_the_class_of_what_is_in_the_middle(items):
    made, seen = Scenes(items, 'corners', 128), set()
    assert made.classes == ('item 1, item 1', 'item 1, item 8', 'item 8, item 1', 'item 8, item 8')
    brightness = {(60 + 15 * i) / 255: i for i in range(10)}

    def item(part):
        return brightness[min(brightness, key=lambda b: abs(b - float(part.amax())))]

    for i in range(30):
        (pixels,), classes = made.scene(i, 0)
        first, last = item(pixels[:32, :32]), item(pixels[-32:, -32:])
        middle = pixels[42:84, 42:84]
        assert {first, last} <= {1, 8} and item(middle) not in (1, 8)
        assert made.classes[int(classes.max()) - 1] == f'item {first}, item {last}'
        assert torch.equal(classes > 0, F.pad(middle > 0, (42, 44, 42, 44))) and pixels[42:84, :42].amax() == 0
        seen.add(int(classes.max()))
    assert seen == {1, 2, 3, 4}


def test_dark_pixels_of_an_item_are_not_its_own(items):
    items.images[:, :, :, 14:] = 25  # its right half
    _, classes = Scenes(items, 'clothes', 64).scene(0, 7)
    bright = ImageSet(items.images.clone().fill_(200), items.labels, items.classes, 32)
    _, whole = Scenes(bright, 'clothes', 64).scene(0, 7)
    assert 0.3 < ((classes > 0).sum() / (whole > 0).sum()).item() < 0.8


@pytest.mark.parametrize('kind', ['clothes', 'corners'])
def test_a_scene_depends_on_its_number_and_seed_alone(items, kind):
    made = Scenes(items, kind, 128)
    pixels, classes = made.batch(3, 4, 5)
    for i in range(4):
        assert torch.equal(pixels[i], made.scene(3 + i, 5)[0])
        assert torch.equal(classes[i], made.scene(3 + i, 5)[1])
    assert len({tuple(made.scene(i, seed)[0].flatten().tolist()) for i in range(5) for seed in (0, 1)}) == 10


def test_intersection_over_union_by_hand():
    truth, said = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 1])
    confusion = torch.bincount(truth * 3 + said, minlength=9).view(3, 3).double()
    torch.testing.assert_close(intersection_over_union(confusion), torch.tensor([1 / 3, 2 / 5, 0.0]).double())
    confusion[2, :] = confusion[:, 2] = 0  # a class that is neither there nor said counts for nothing
    assert intersection_over_union(confusion).isnan().tolist() == [False, False, True]


def reach(model, side=128):
    """How many pixels a change in the middle of an image reaches to the left, in what a model says."""
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    changed = x.clone()
    changed[..., side // 2, side // 2] += 1000
    with torch.no_grad():
        columns = (model(changed) - model(x)).abs().amax((0, 1, 2)) > 0
    return side // 2 - int(columns.nonzero().min())


def test_networks_are_of_one_size_and_see_more_or_less_of_a_scene():
    models = {
        n: network(Settings(network=n, canvas=128), 3, 11).double().eval() for n in ('linformer', 'unet', 'deep_unet')
    }
    sizes = {n: sum(p.numel() for p in model.parameters()) for n, model in models.items()}
    assert sizes == {'linformer': 292_811, 'unet': 290_123, 'deep_unet': 280_683}
    assert reach(models['unet']) < 24 and reach(models['deep_unet']) > 48 and reach(models['linformer']) == 64


def test_muon_takes_the_matrices_within_the_networks_alone():
    model = torch.nn.Sequential(torch.nn.Identity(), network(Settings(canvas=64), 3, 11))
    groups = segment_pixels.create_optimizer(model, Settings()).param_groups
    fallback = {id(p) for group in groups if group.get('use_fallback') for p in group['params']}
    by_adamw = {name for name, p in model.named_parameters() if id(p) in fallback and p.ndim > 1}
    parts = ('patch_embed.proj.', 'position.local.', 'projection.weights.0', 'projection.weights.1', 'head.')
    assert len(by_adamw) == 5 and all(any(part in name for name in by_adamw) for part in parts)


@torch.no_grad()
@pytest.mark.parametrize('backbone, factor', [('test_linformer_vit', 4), ('linformer_vit_pico_patch4_32', 1)])
def test_the_backbone_stands_at_a_quarter_of_the_resolution(backbone, factor):
    model = network(Settings(backbone=backbone, pretrained=False, canvas=64), 1, 11).eval()
    seen = []
    model.tokens.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 1, 64, 64)
    assert model(x).shape == (2, 11, 64, 64) and model.tokens(x).shape == (2, 96, 16, 16)
    torch.testing.assert_close(seen[0], F.avg_pool2d(x, factor))


def test_a_backbone_of_large_patches_is_refused():
    with pytest.raises(Mistake, match='1, 2 or 4 pixels, got 8 of linformer_vit_small_patch8_224'):
        network(Settings(backbone='linformer_vit_small_patch8_224', pretrained=False, canvas=64), 3, 11)


@pytest.mark.parametrize('canvas', [32, 72])
def test_a_canvas_that_cannot_be_is_refused(canvas, tmp_path):
    with pytest.raises(SystemExit, match=f'multiple of 16, and 48 pixels at least, got {canvas}'):
        segment_pixels.main(Settings(canvas=canvas, output_dir=tmp_path))


@pytest.mark.parametrize('kind', ['linformer', 'deep_unet'])
def test_a_run_is_scored_drawn_and_goes_on_where_it_was_stopped(kind, items, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segment_pixels, 'create_dataset', lambda *_: items)
    settings = Settings(kind, 'clothes', 'test_linformer_vit', False, 0.05, canvas=48, test_scenes=30, device='cpu')
    settings.output_dir = tmp_path
    metrics = segment_pixels.main(settings)
    assert metrics == json.loads((tmp_path / 'metrics.json').read_text())
    assert set(metrics['iou']) == set(items.classes) and 0 <= metrics['mean_iou'] <= 1
    assert metrics['mean_iou'] == pytest.approx(sum(metrics['iou'].values()) / 10)
    assert (tmp_path / 'scenes.png').stat().st_size > 10_000
    assert segment_pixels.main(settings) == metrics and 'finished' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='other settings'):
        segment_pixels.main(dataclasses.replace(settings, lr=1.0))


def test_training_goes_on_from_its_checkpoint(items, tmp_path):
    settings = Settings('unet', minutes=0.05, canvas=48, output_dir=tmp_path, device='cpu')
    model, device = network(settings, 1, 11), torch.device('cpu')
    optimizer = segment_pixels.create_optimizer(model, settings)
    at = {'step': 1234, 'seconds': 2.9}
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'at': at}, tmp_path / 'checkpoint.pt')
    found = segment_pixels.train(network(settings, 1, 11), Scenes(items, 'clothes', 48), settings, device)
    assert found['scenes_seen'] > 1234 * 8 and found['train_minutes'] >= 0.05


@pytest.mark.parametrize('content', ['', '{', '[1]', 'null', '\xff', '[' * 10_000], ids=range(6))
@pytest.mark.parametrize('name', ['settings.json', 'metrics.json', 'checkpoint.pt'])
def test_a_damaged_file_of_a_run_is_a_sentence(name, content, items, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_pixels, 'create_dataset', lambda *_: items)
    (tmp_path / name).write_text(content)
    with pytest.raises(Mistake, match=f'{name} is damaged .*Move it away'):
        segment_pixels.main(Settings('unet', canvas=48, output_dir=tmp_path, device='cpu'))


@pytest.mark.parametrize('saved', [[], {}, 5, {'model': {}, 'optimizer': {}, 'at': {}}], ids=str)
def test_a_checkpoint_that_no_run_wrote_is_a_sentence(saved, items, tmp_path):
    torch.save(saved, tmp_path / 'checkpoint.pt')
    settings = Settings('unet', canvas=48, output_dir=tmp_path, device='cpu')
    with pytest.raises(Mistake, match='checkpoint.pt is damaged'):
        segment_pixels.train(network(settings, 1, 11), Scenes(items, 'clothes', 48), settings, torch.device('cpu'))


def test_networks_are_compared_at_the_rate_that_validation_chose(tmp_path, monkeypatch):
    asked, tables, results = {}, {}, {}

    def segment_all(runs, workers):
        asked.update(runs)
        found = {}
        for key, own in runs.items():
            own['output_dir'].mkdir(parents=True)
            (own['output_dir'] / 'scenes.png').write_bytes(own['output_dir'].name.encode())
            score = 0.5 if own['lr'] == 0.02 else 0.4
            found[key] = {'mean_iou': score + 0.01 * own.get('seed', 0), 'pixel_accuracy': 0.9, 'iou': {}}
            found[key] |= {'train_minutes': own['minutes'], 'num_parameters': 1234, 'scenes_seen': 8000}
        return found

    def publish(name, result, text):
        tables[name], results[name] = text, result

    monkeypatch.setattr(segmentation, 'segment_all', segment_all)
    monkeypatch.setattr(segmentation, 'DOCS', tmp_path)
    monkeypatch.setattr(segmentation, 'publish', publish)
    (tmp_path / 'images').mkdir()
    settings = segmentation.Settings(minutes=10.0, seeds=2, data_dir=tmp_path, output_dir=tmp_path / 'runs')
    segmentation.segmentation(settings)
    long = [own for own in asked.values() if own['minutes'] == (20.0 if own['scenes'] == 'corners' else 10.0)]
    assert len(long) == 9 * 2 and len(asked) == 9 * 4 and {own['lr'] for own in long} == {0.02}
    assert all(own.get('validation', False) == (own not in long) for own in asked.values())
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / 'images').iterdir()}
    assert pictures == {
        f'segmentation_{kind}_linformer': f'{kind}_linformer_0'.encode() for kind in ('clothes', 'corners')
    }
    scores = '50.5 ± 0.7 % | +0.0 (s.e. 0.0) | 90.0 ± 0.0 %'
    line = f'| clothes | U-Net, two levels deeper | 1,234 | 0.02 | {scores} | 8,000 | 2 |'
    assert line in tables['segmentation'].splitlines()
    assert results['segmentation']['tried']['corners, unet, 0.01'] == 0.4
