"""Decoders of other packages take a Linformer ViT as their encoder, and maps have the reductions that are asked for."""

import pytest
import timm
import torch
import torch.nn.functional as F

import linvision  # noqa: F401  (registers the models)

NAME = 'test_linformer_vit'


def images(size=(16, 16)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def dpt(**kwargs):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs segmentation-models-pytorch')
    torch.manual_seed(0)
    arguments = {'encoder_weights': None, 'encoder_depth': 3, 'classes': 4, 'decoder_readout': 'ignore'}
    arguments |= {'decoder_intermediate_channels': (8, 8, 8), 'decoder_fusion_channels': 8}
    return smp.DPT(f'tu-{NAME}', **{**arguments, **kwargs})


@pytest.mark.parametrize(
    'changes',
    [
        {'img_size': 32},
        {'img_size': 32, 'class_token': True, 'decoder_readout': 'cat', 'patch_size': 2},
        {'dynamic_img_size': True},
    ],
)
def test_smps_dpt_takes_the_backbone_and_learns(changes):
    model = dpt(**changes)
    assert model.encoder.output_strides == [changes.get('patch_size', 1)] * 3
    masks = model(images((32, 32)))
    assert masks.shape == (2, 4, 32, 32)
    F.cross_entropy(masks, torch.zeros(2, 32, 32, dtype=torch.long)).backward()
    encoder = model.encoder.model
    assert all(p.grad is not None and p.grad.any() for p in encoder.blocks[0].parameters() if p.ndim > 1)
    assert all(w.grad is not None and w.grad.any() for w in encoder.projection.weights)


def test_maps_have_the_reductions_that_are_asked_for_and_are_means_of_tokens():
    arguments = {'features_only': True, 'patch_size': 2}
    torch.manual_seed(0)
    plain = timm.create_model(NAME, out_indices=(0, 2), **arguments)
    torch.manual_seed(0)
    pyramid = timm.create_model(NAME, out_indices=(0, -1, 2), reductions=(2, 4, 16), **arguments)
    assert pyramid.feature_info.reduction() == [2, 4, 16] and pyramid.feature_info.channels() == [32] * 3
    assert plain.feature_info.reduction() == [2, 2]
    first, last = plain(images())
    found = pyramid(images())
    assert torch.equal(found[0], first)
    torch.testing.assert_close(found[1], last.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5)))
    torch.testing.assert_close(found[2], last.mean((2, 3), keepdim=True))


def test_a_pyramid_has_as_many_of_the_last_blocks_as_reductions_and_prunes_the_others():
    pyramid = timm.create_model(NAME, features_only=True, reductions=(1, 4), dynamic_img_size=True)
    assert pyramid.taken == [1, 2]
    assert [tuple(m.shape[2:]) for m in pyramid(images((18, 10)))] == [(18, 10), (5, 3)]
    cut = timm.create_model(NAME, features_only=True, reductions=(1,), out_indices=(0,))
    assert len(cut.model.blocks) == 1
    sum(m.square().sum() for m in cut(images())).backward()
    assert all(p.grad is not None for p in cut.parameters())


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'reductions': (2, 3), 'patch_size': 2}, r'2 multiples of the patch size \(2, 2\).*got \[2, 3\]'),
        ({'reductions': (4, 2)}, 'none below the one before'),
        ({'reductions': (1, 2), 'out_indices': (0, 1, 2)}, '3 multiples'),
        ({'reductions': (1, 2), 'features_only': False}, 'features_only=True; give both'),
        ({'output_stride': 8}, r'its patch size, 1, in every block, got 8: .*reductions=\('),
    ],
)
def test_impossible_reductions_and_strides_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model(NAME, **{'features_only': True, **arguments})


def test_the_output_stride_that_a_model_has_is_taken():
    assert timm.create_model(NAME, features_only=True, output_stride=1).feature_info.reduction() == [1, 1, 1]
