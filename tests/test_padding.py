"""Padded tokens: what stands in them changes nothing, and an image with padding is the image without."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from linvision.models.projection import SHARING
from linvision.models.projection_kinds import PROJECTIONS

CREATE = dict(num_classes=5, img_size=8, proj_len=16, depth=2, dtype=torch.float64)
KINDS = [*PROJECTIONS, 'none']


def create(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('test_linformer_vit', **{**CREATE, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def corner(height: int, width: int, size: int = 8) -> torch.Tensor:
    """A mask of one image that is real in its upper left corner: (1, N), true where it is padding."""
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[:height, :width] = False
    return mask.flatten().unsqueeze(0)


def masks() -> torch.Tensor:
    """Nothing padded; a corner left; holes at random."""
    torch.manual_seed(2)
    return torch.cat([corner(8, 8), corner(4, 5), torch.rand(1, 64) < 0.5])


@pytest.mark.parametrize(
    'tokens', [dict(token_norm=True), dict(class_token=True, global_pool='token', reg_tokens=1, row_norm=True)]
)
@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', KINDS)
def test_what_stands_in_padding_changes_no_output_and_no_gradient(kind, sharing, tokens):
    model = create(projection=kind, sharing=sharing, **tokens)
    torch.manual_seed(1)
    clean = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    padded = masks().view(3, 1, 8, 8)
    seen = []
    for value in (0.0, 1e4, float('nan')):
        images = clean.masked_fill(padded, value).requires_grad_()
        model.zero_grad()
        logits = model(images, key_padding_mask=masks())
        logits.square().sum().backward()
        seen.append([logits, images.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    assert not seen[0][1].masked_select(padded).any() and seen[0][1].masked_select(~padded).any()
    torch.testing.assert_close(seen[0][0][0], model(clean[:1])[0])  # the first image has no padding


@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', ['mean_pool', 'max_pool', 'conv', 'none'])
def test_padded_image_equals_the_image_without_padding_where_cells_are_aligned(kind, sharing):
    arguments = dict(projection=kind, sharing=sharing, class_token=True, local_size=3, pos_embed='conv')
    padded = create(img_size=16, proj_len=64, **arguments)  # cells of 2 × 2 tokens
    small = create(img_size=8, proj_len=16, **arguments)
    small.load_state_dict(padded.state_dict())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    mask = corner(8, 8, 16).expand(2, -1)
    torch.testing.assert_close(padded(images, key_padding_mask=mask), small(images[:, :, :8, :8]))


def test_norms_over_all_tokens_leave_padding_out():
    arguments = dict(projection='mean_pool', token_norm=True, local_size=3, pos_embed='conv')
    padded = create(img_size=16, proj_len=64, **arguments)
    small = create(img_size=8, proj_len=16, **arguments)
    small.load_state_dict(padded.state_dict())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    mask = corner(8, 8, 16).expand(2, -1)
    torch.testing.assert_close(padded(images, key_padding_mask=mask), small(images[:, :, :8, :8]))


@pytest.mark.parametrize('chunk_size', [0, 20])
def test_padding_stays_small_where_an_image_hardly_varies(chunk_size):
    """Norms over all tokens multiply by 1 / sqrt(1e-5) there."""
    model = create(token_norm=True, depth=12, pos_embed='none', chunk_size=chunk_size)
    tokens = model.forward_features(torch.ones(1, 3, 8, 8, dtype=torch.float64), key_padding_mask=corner(5, 8))
    padding = corner(5, 8)[0]
    assert tokens[:, padding].abs().max() < tokens[:, ~padding].abs().max()


@pytest.mark.parametrize('sharing', ['layerwise', 'key_value', 'headwise'])
def test_padding_leaves_out_columns_of_e_and_their_part_of_the_biases(sharing):
    arguments = dict(
        projection='linear', sharing=sharing, pos_embed='none', local_size=0, global_pool='', num_classes=0
    )
    model, cut = create(**arguments), create(**arguments)
    mask = torch.rand(64) < 0.4
    with torch.no_grad():
        for weight in cut.projection.weights:
            weight.flatten(-2)[:, mask] = 0.0
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    masked = model(images, key_padding_mask=mask.expand(2, -1))
    torch.testing.assert_close(masked[:, ~mask], cut(images)[:, ~mask])


def test_padding_in_full_attention_is_timms_mask_over_keys():
    arguments = dict(img_size=8, patch_size=2, embed_dim=24, depth=2, num_heads=3, num_classes=5, dtype=torch.float64)
    plain = VisionTransformer(**arguments, class_token=True, global_pool='token').eval()
    model = timm.create_model(
        'test_linformer_vit', **arguments, projection='none', local_size=0, pos_embed='learn', mlp_ratio=4,
        class_token=True, global_pool='token',
    ).eval()  # fmt: skip
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    mask = torch.rand(2, 16) < 0.5
    keys = torch.cat([torch.ones(2, 1, dtype=torch.bool), ~mask], dim=1)[
        :, None, None
    ]  # (B, 1, 1, 1 + N), true: attend
    expected = plain(images, attn_mask=keys.expand(2, 1, 17, 17))
    torch.testing.assert_close(model(images, key_padding_mask=mask), expected)


@pytest.mark.parametrize('pool', ['avg', 'token'])
def test_features_and_intermediates_take_the_mask(pool):
    model = create(class_token=True, global_pool=pool)
    images, mask = torch.randn(3, 3, 8, 8, dtype=torch.float64), masks()
    features = model.forward_features(images, key_padding_mask=mask)
    final, _ = model.forward_intermediates(images, key_padding_mask=mask)
    assert torch.equal(features, final)
    pooled = torch.stack([f[0] if pool == 'token' else f[1:][~m].mean(0) for f, m in zip(features, mask, strict=True)])
    torch.testing.assert_close(model.head(model.fc_norm(pooled)), model(images, key_padding_mask=mask))


@pytest.mark.parametrize(
    'mask, message',
    [
        (torch.zeros(2, 63, dtype=torch.bool), r'shape \(2, 64\).*got torch.bool \[2, 63\]'),
        (torch.zeros(1, 64, dtype=torch.bool), r'shape \(2, 64\).*got torch.bool \[1, 64\]'),
        (torch.zeros(2, 64), r'must be boolean.*got torch.float32 \[2, 64\]'),
        (torch.arange(128).view(2, 64) >= 64, r'hides all of images \[1\]'),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        create()(torch.randn(2, 3, 8, 8, dtype=torch.float64), key_padding_mask=mask)


def test_a_mask_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match='boolean tensor.*got list'):
        create()(torch.randn(1, 3, 8, 8, dtype=torch.float64), key_padding_mask=[[True] * 64])


@pytest.mark.parametrize('pool', ['max', 'avgmax', 'map'])
def test_pooling_that_cannot_leave_out_padding_is_refused_before_the_blocks_run(pool):
    model, images = create(global_pool=pool, class_token=False), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    seen = []
    model.patch_embed.register_forward_hook(lambda module, args, output: seen.append(output))
    message = rf"global_pool must be 'avg' or 'token', got '{pool}'"
    with pytest.raises(ValueError, match=message):
        model(images, key_padding_mask=masks())
    assert not seen
    features = model.forward_features(images, key_padding_mask=masks())
    with pytest.raises(ValueError, match=message):
        model.forward_head(features, key_padding_mask=masks())


def test_a_pool_that_includes_the_prefix_includes_it_with_a_mask():
    model = create(class_token=True, reg_tokens=2, global_pool='avg', pool_include_prefix=True)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    features = model.forward_features(images, key_padding_mask=masks())
    inside = torch.cat([torch.ones(3, 3, dtype=torch.bool), ~masks()], dim=1)  # (B, P + N)
    pooled = torch.stack([f[i].mean(0) for f, i in zip(features, inside, strict=True)])
    torch.testing.assert_close(model(images, key_padding_mask=masks()), model.head(model.fc_norm(pooled)))
    nothing = torch.zeros(3, 64, dtype=torch.bool)
    torch.testing.assert_close(model(images, key_padding_mask=nothing), model(images))
