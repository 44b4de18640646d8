"""Images of different sizes in one batch: each gives what it gives alone, and padding is nothing."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import Patchify
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

from linvision.models.mixed_sizes import collate, padding_share, token_batches
from linvision.models.projection_kinds import PROJECTIONS

SIZES = [(16, 16), (8, 20), (12, 6), (8, 20), (30, 10)]
KINDS = [*PROJECTIONS, 'none']


def create(**arguments):
    torch.manual_seed(0)
    settings = {'dynamic_img_size': True, 'dtype': torch.float64, 'num_classes': 5, 'proj_len': 9, 'depth': 2}
    model = timm.create_model('test_linformer_vit', **{**settings, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def samples(patch=2):
    torch.manual_seed(1)
    return [(torch.randn(3, h, w, dtype=torch.float64), i) for i, (h, w) in enumerate(SIZES)]


@pytest.mark.parametrize('chunk_size', [0, 16])
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_each_image_gives_what_it_gives_alone(kind, chunk_size):
    tokens = dict(token_norm=True) if chunk_size else dict(class_token=True)
    model = create(projection=kind, patch_size=2, chunk_size=chunk_size, **tokens)
    batch, labels = collate(samples(), (2, 2))
    found = model(batch)
    alone = torch.cat([model(image.unsqueeze(0)) for image, _ in samples()])
    torch.testing.assert_close(found, alone)
    assert labels.tolist() == list(range(5))


@torch.no_grad()
def test_padding_and_the_order_of_patches_change_nothing():
    model = create(pos_embed='learn', patch_size=2)
    batch, _ = collate(samples(), (2, 2))
    assert padding_share(batch) == pytest.approx(1 - sum(h * w / 4 for h, w in SIZES) / (5 * 75))
    wanted = model(batch)
    batch['patches'][~batch['patch_valid']] = float('nan')
    batch['patch_coord'][~batch['patch_valid']] = 1000
    order = torch.randperm(75)
    assert torch.equal(model({name: entry[:, order] for name, entry in batch.items()}), wanted)
    whole = batch['patches'].unflatten(2, (2, 2, 3))
    assert torch.equal(model({**batch, 'patches': whole}), wanted)


@pytest.mark.parametrize('chunk_size', [0, 16])
def test_gradients_are_the_sum_of_those_of_each_image(chunk_size):
    model = create(patch_size=2, chunk_size=chunk_size).train()
    model(collate(samples(), (2, 2))[0]).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for image, _ in samples():
        model(image.unsqueeze(0)).square().sum().backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()})


def test_timms_patches_are_the_ones_that_are_read():
    image = Image.effect_noise((12, 8), 60).convert('RGB')
    ours, _ = collate([(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, 0)], (2, 2))
    theirs = Patchify(2)(image)
    for name in ours:
        torch.testing.assert_close(ours[name][0], theirs[name].to(ours[name].dtype))


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda b: {'patches': b['patches']}, 'are missing'),
        (lambda b: {**b, 'patches': b['patches'][..., :5]}, r'must be \(B, N, 12\), channels last'),
        (lambda b: {**b, 'patch_valid': b['patch_valid'] & (torch.arange(75) != 3)}, r'has 63 of the 8 × 8'),
        (lambda b: {**b, 'patch_coord': b['patch_coord'].clone().index_fill_(1, torch.tensor([0]), 1)}, 'twice'),
    ],
)
def test_what_is_no_whole_image_is_refused(change, words):
    model, (batch, _) = create(patch_size=2), collate(samples(), (2, 2))
    with pytest.raises(ValueError, match=words):
        model(change(batch))


@pytest.mark.parametrize('class_token', [True, False])
@torch.no_grad()
def test_features_are_those_of_each_image_where_its_patches_stand(class_token):
    model = create(patch_size=2, class_token=class_token, global_pool='avg')
    P, (batch, _) = model.num_prefix_tokens, collate(samples(), (2, 2))
    order = torch.randperm(75)
    batch = {name: entry[:, order] for name, entry in batch.items()}
    found = model.forward_features(batch)
    result = model.forward_intermediates(
        batch, indices=[0, 1], output_fmt='NLC', output_dict=True, return_prefix_tokens=True
    )
    assert torch.equal(found['patch_valid'], batch['patch_valid']) and torch.equal(
        result['image_features'], found['patches']
    )
    for i, (image, _) in enumerate(samples()):
        valid, coord = batch['patch_valid'][i], batch['patch_coord'][i]
        place = (coord[:, 0] * (image.shape[2] // 2) + coord[:, 1])[valid]
        alone = model.forward_features(image.unsqueeze(0))[0]
        torch.testing.assert_close(found['patches'][i, :P], alone[:P])
        torch.testing.assert_close(found['patches'][i, P:][valid], alone[P:][place])
        assert not found['patches'][i, P:][~valid].any()
        maps = model.forward_intermediates(image.unsqueeze(0), indices=[0, 1], intermediates_only=True)
        for layer, one in zip(result['image_intermediates'], maps, strict=True):
            torch.testing.assert_close(layer[i][valid], one[0].flatten(1).T[place])
    head = model.forward_head(found['patches'], key_padding_mask=~found['patch_valid'])
    torch.testing.assert_close(head, model(batch))


@torch.no_grad()
def test_features_have_the_form_of_timms_naflexvit():
    cfg = NaFlexVitCfg(patch_size=2, embed_dim=32, depth=2, num_heads=2, class_token=True)
    theirs, ours = NaFlexVit(cfg).double().eval(), create(patch_size=2, class_token=True)
    batch = collate(samples(), (2, 2))[0]

    def form(value):
        if isinstance(value, dict):
            return {name: form(entry) for name, entry in value.items()}
        return list(value.shape) if isinstance(value, torch.Tensor) else (type(value), [form(x) for x in value])

    assert form(ours.forward_features(batch)) == form(theirs.forward_features(**batch))
    for how in (
        dict(),
        dict(return_prefix_tokens=True),
        dict(intermediates_only=True, indices=1),
        dict(output_dict=True, return_prefix_tokens=True),
        dict(output_dict=True, intermediates_only=True),
    ):
        found = [model.forward_intermediates(batch, output_fmt='NLC', **how) for model in (ours, theirs)]
        assert form(found[0]) == form(found[1]), how
    for model in (ours, theirs):
        with pytest.raises(ValueError, match='NLC'):
            model.forward_intermediates(batch)
    dropping = create(patch_size=2, patch_drop_rate=0.5, projection='none', local_size=0).train()
    with pytest.raises(ValueError, match='patch_drop_rate must be 0 for features'):
        dropping.forward_features(batch)
    assert dropping(batch).shape == (5, 5)


def test_a_batch_is_divided_as_its_images_are():
    model, (batch, _) = create(patch_size=2), collate(samples(), (2, 2))
    parts = batch.chunk(2)
    assert [len(part['patches']) for part in parts] == [3, 2] and parts[0].device == batch.device
    torch.testing.assert_close(torch.cat([model(part) for part in parts]), model(batch))


def test_models_of_one_size_and_without_pooling_refuse_mixed_sizes():
    batch, _ = collate(samples(), (2, 2))
    with pytest.raises(ValueError, match='dynamic_img_size=True; this one has one size'):
        create(patch_size=2, dynamic_img_size=False)(batch)
    with pytest.raises(ValueError, match='give no key_padding_mask'):
        create(patch_size=2)(batch, key_padding_mask=~batch['patch_valid'])
    with pytest.raises(ValueError, match="global_pool must not be ''"):
        create(patch_size=2, global_pool='', num_classes=0)(batch)
    with pytest.raises(ValueError, match=r'multiples of the patch size \(4, 4\), got \[30, 10\]'):
        collate(samples()[:2] + samples()[4:], (4, 4))
    for sides in ((10, 8), (8, 10)):
        with pytest.raises(ValueError, match=r'multiples of the patch size \(4, 4\)'):
            collate([(torch.zeros(3, *sides), 0)], (4, 4))


def test_batches_keep_to_a_budget_of_tokens_and_hold_every_image_once():
    grids = [(4, 4), (8, 8), (2, 2), (4, 4), (2, 8), (30, 30)]
    batches = token_batches(grids, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    tokens = [[grids[i][0] * grids[i][1] for i in batch] for batch in batches]
    assert all(sum(t) <= 64 or len(t) == 1 for t in tokens)
    assert batches == [[2, 4, 0, 3], [1], [5]]
