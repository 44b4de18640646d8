"""Scenes of overlapping items: what they are made of, how they are scored, and that a run of both networks learns."""

import dataclasses
import json

import pytest
import torch

import segment_pixels
from linvision.data import ImageSet
from linvision.guard import Mistake
from scripts.studies import segmentation
from segment_pixels import Settings, UNet, intersection_over_union, network, scene, scenes


@pytest.fixture
def items():
    """Ten flat items of 28×28, item i of class i and of its own brightness."""
    images = (60 + 15 * torch.arange(10, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(10, 1, 28, 28)
    return ImageSet(images.contiguous(), torch.arange(10), tuple(f'item {i}' for i in range(10)), 32)


def test_the_class_of_a_pixel_is_that_of_the_item_on_top(items):
    brightness = torch.cat([torch.zeros(1), (60 + 15 * torch.arange(10)) / 255])
    for i in range(20):
        pixels, classes = scene(items, i, 7, 64)
        torch.testing.assert_close(pixels[0], brightness[classes])
        assert 1 <= len(classes[classes > 0].unique()) <= 5


def test_dark_pixels_of_an_item_are_not_its_own(items):
    items.images[:, :, :, 14:] = 25  # its right half
    _, classes = scene(items, 0, 7, 64)
    bright = ImageSet(items.images.clone().fill_(200), items.labels, items.classes, 32)
    _, whole = scene(bright, 0, 7, 64)
    assert 0.3 < ((classes > 0).sum() / (whole > 0).sum()).item() < 0.8


def test_a_scene_depends_on_its_number_and_seed_alone(items):
    pixels, classes = scenes(items, 3, 4, 5, 64)
    for i in range(4):
        assert torch.equal(pixels[i], scene(items, 3 + i, 5, 64)[0])
        assert torch.equal(classes[i], scene(items, 3 + i, 5, 64)[1])
    assert len({tuple(scene(items, i, seed, 64)[1].flatten().tolist()) for i in range(5) for seed in (0, 1)}) == 10


def test_intersection_over_union_by_hand():
    truth, said = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 1])
    confusion = torch.bincount(truth * 3 + said, minlength=9).view(3, 3).double()
    torch.testing.assert_close(intersection_over_union(confusion), torch.tensor([1 / 3, 2 / 5, 0.0]).double())


def test_both_networks_are_of_one_size_and_see_whole_scenes():
    sizes = [sum(p.numel() for p in network(Settings(network=n), 11).parameters()) for n in ('linformer', 'unet')]
    assert sizes == [210_443, 203_690]
    model = UNet(11).eval()
    x = torch.randn(1, 1, 64, 64)
    changed = x.clone()
    changed[..., 63, 63] += 1
    difference = (model(changed) - model(x)).abs().sum((0, 1))
    assert difference[63, 63] > 0 and difference[0, 0] == 0  # convolutions reach only so far


def test_muon_takes_the_matrices_within_the_networks_alone():
    model = torch.nn.Sequential(torch.nn.Identity(), network(Settings(), 11))
    groups = segment_pixels.create_optimizer(model, Settings()).param_groups
    fallback = {id(p) for group in groups if group.get('use_fallback') for p in group['params']}
    by_adamw = {name for name, p in model.named_parameters() if id(p) in fallback and p.ndim > 1}
    parts = ('patch_embed.proj.', 'position.local.', 'projection.weights.0', 'projection.weights.1', 'head.1.')
    assert len(by_adamw) == 5 and all(any(part in name for name in by_adamw) for part in parts)


@torch.no_grad()
def test_tokens_of_several_pixels_give_a_class_for_every_pixel():
    model = network(Settings(backbone='linformer_vit_tiny_patch2_224', pretrained=False, canvas=32), 11).eval()
    x = torch.randn(1, 1, 32, 32)
    coarse = model.head(model.features(x)[-1])
    torch.testing.assert_close(model(x), torch.nn.functional.interpolate(coarse, size=(32, 32), mode='bilinear'))


@pytest.mark.parametrize('canvas', [24, 50])
def test_a_canvas_that_cannot_be_is_refused(canvas, tmp_path):
    with pytest.raises(SystemExit, match=f'multiple of 4, and 28 pixels at least, got {canvas}'):
        segment_pixels.main(Settings(canvas=canvas, output_dir=tmp_path))


@pytest.mark.parametrize('kind', ['linformer', 'unet'])
def test_a_run_is_scored_drawn_and_goes_on_where_it_was_stopped(kind, items, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segment_pixels, 'create_dataset', lambda *_: items)
    settings = Settings(kind, 'test_linformer_vit', False, 0.05, canvas=32, test_scenes=30, device='cpu')
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
    settings = Settings('unet', minutes=0.05, canvas=32, output_dir=tmp_path, device='cpu')
    model, device = UNet(11), torch.device('cpu')
    optimizer = segment_pixels.create_optimizer(model, settings)
    at = {'step': 1234, 'seconds': 2.9}
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'at': at}, tmp_path / 'checkpoint.pt')
    found = segment_pixels.train(UNet(11), items, settings, device)
    assert found['scenes_seen'] > 1234 * 8 and found['train_minutes'] >= 0.05


@pytest.mark.parametrize('content', ['', '{', '[1]', 'null', '\xff', '[' * 10_000], ids=range(6))
@pytest.mark.parametrize('name', ['settings.json', 'metrics.json', 'checkpoint.pt'])
def test_a_damaged_file_of_a_run_is_a_sentence(name, content, items, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_pixels, 'create_dataset', lambda *_: items)
    (tmp_path / name).write_text(content)
    with pytest.raises(Mistake, match=f'{name} is damaged .*Move it away'):
        segment_pixels.main(Settings('unet', canvas=32, output_dir=tmp_path, device='cpu'))


@pytest.mark.parametrize('saved', [[], {}, 5, {'model': {}, 'optimizer': {}, 'at': {}}], ids=str)
def test_a_checkpoint_that_no_run_wrote_is_a_sentence(saved, items, tmp_path):
    torch.save(saved, tmp_path / 'checkpoint.pt')
    settings = Settings('unet', canvas=32, output_dir=tmp_path, device='cpu')
    with pytest.raises(Mistake, match='checkpoint.pt is damaged'):
        segment_pixels.train(UNet(11), items, settings, torch.device('cpu'))


def test_networks_are_compared_with_what_validation_chose(tmp_path, monkeypatch):
    asked, tables = {}, {}

    def segment_all(runs, workers):
        asked.update(runs)
        found = {}
        for name, own in runs.items():
            own['output_dir'].mkdir(parents=True)
            (own['output_dir'] / 'scenes.png').write_bytes(name.encode())
            score = 0.5 if own['lr'] == 0.02 else 0.4
            found[name] = {'mean_iou': score, 'pixel_accuracy': 0.9, 'iou': {}, 'scenes_seen': 8000}
            found[name] |= {'train_minutes': own['minutes'], 'num_parameters': 1234}
        return found

    monkeypatch.setattr(segmentation, 'segment_all', segment_all)
    monkeypatch.setattr(segmentation, 'DOCS', tmp_path)
    monkeypatch.setattr(segmentation, 'publish', lambda name, result, text: tables.update({name: text}))
    (tmp_path / 'images').mkdir()
    segmentation.segmentation(segmentation.Settings(minutes=10.0, data_dir=tmp_path, output_dir=tmp_path / 'runs'))
    assert [(own['network'], own['opt'], own['lr']) for own in asked.values() if own['minutes'] == 10.0] == [
        ('linformer', 'muon', 0.02),
        ('unet', 'muon', 0.02),
    ]
    assert all(own.get('validation', False) == (own['minutes'] == 1.5) for own in asked.values()) and len(asked) == 7
    assert (tmp_path / 'images/segmentation_unet.png').read_bytes() == b'unet'
    assert tables['segmentation'].splitlines()[3] == '| U-Net | 1,234 | muon, 0.02 | 50.0 % | 90.0 % | 8,000 | 10.0 |'
