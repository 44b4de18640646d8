"""Position embeddings: what they add, against sums and windows written out, and what may be dropped without them."""

import pytest
import timm
import torch
import torch.nn.functional as F

from linvision.models.local_conv import LocalPath
from linvision.models.position import POSITIONS, ConvPosition, SeparablePosition

GRID = (3, 5)
N, D = 15, 4


def test_separable_adds_a_row_and_a_column():
    position = SeparablePosition(D, GRID, GRID)
    x = torch.randn(2, N, D)
    out = position(x, GRID)
    for i in range(GRID[0]):
        for j in range(GRID[1]):
            expected = x[:, i * GRID[1] + j] + position.row[0, i] + position.column[0, j]
            torch.testing.assert_close(out[:, i * GRID[1] + j], expected)


@pytest.mark.parametrize('size', [1, 3, 5])
@pytest.mark.parametrize('prefix', [0, 2])
def test_local_path_equals_windows_written_out(size, prefix):
    local = LocalPath(D, size, GRID, prefix, std=1.0, dtype=torch.float64)
    x = torch.randn(2, prefix + N, D, dtype=torch.float64)
    r = size // 2
    image = F.pad(x[:, prefix:].unflatten(1, GRID), (0, 0, r, r, r, r))  # (B, h + 2r, w + 2r, D)
    expected = torch.zeros_like(x)  # nothing for prefix tokens
    for i in range(GRID[0]):
        for j in range(GRID[1]):
            for d in range(D):
                window = image[:, i : i + size, j : j + size, d]
                expected[:, prefix + i * GRID[1] + j, d] = (window * local.weight[d, 0]).sum((1, 2))
    torch.testing.assert_close(local(x, GRID), expected)


def test_conv_adds_its_local_path_and_starts_away_from_zero():
    position = ConvPosition(64, GRID, GRID)
    x = torch.randn(2, N, 64)
    torch.testing.assert_close(position(x, GRID), x + position.local(x, GRID))
    assert position.local.weight.std().item() == pytest.approx(0.2, rel=0.15)
    assert position.local.weight.shape == (64, 1, 3, 3)


@pytest.mark.parametrize('weight_init', ['', 'jax', 'moco', 'skip'])
def test_timm_initialisers_leave_positions_alone(weight_init):
    conv = timm.create_model('test_linformer_vit', pos_embed='conv', local_size=3, weight_init=weight_init)
    separable = timm.create_model('test_linformer_vit', pos_embed='separable', weight_init=weight_init)
    for again in (False, True):
        if again:
            conv.init_weights()
            separable.init_weights()
        assert conv.position.local.weight.std().item() == pytest.approx(0.2, rel=0.3)
        assert separable.position.row.std().item() == pytest.approx(0.02, rel=0.3)
        assert not any(block.attn.local.weight.any() for block in conv.blocks)


@pytest.mark.parametrize('weight_init', ['', 'jax', 'skip', 'reset'])
@pytest.mark.parametrize('pos_embed', ['conv', 'separable'])
def test_timm_initialisers_reach_every_parameter(pos_embed, weight_init):
    with torch.device('meta'):
        model = timm.create_model('test_linformer_vit', pos_embed=pos_embed, weight_init=weight_init, init_values=1e-5)
    model.to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(123.0)
    model.init_weights()
    assert not [name for name, parameter in model.named_parameters() if (parameter == 123.0).any()]


def create(pos_embed, **kwargs):
    arguments = dict(pos_embed=pos_embed, local_size=0, projection='none', num_classes=5, dtype=torch.float64)
    return timm.create_model('test_linformer_vit', img_size=6, **{**arguments, **kwargs}).eval()


@pytest.mark.parametrize('class_token', [False, True])
@pytest.mark.parametrize('pos_embed', ['learn', *POSITIONS])
def test_dropout_of_positions_is_that_of_all_tokens_before_the_blocks(pos_embed, class_token):
    arguments = dict(class_token=class_token, global_pool='avg', projection='separable', proj_len=4)
    model, images = create(pos_embed, pos_drop_rate=0.25, **arguments), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        tokens = model.embed(images)[0]
        model.train()
        torch.manual_seed(3)
        dropped = model.embed(images)[0]
    torch.manual_seed(3)
    assert torch.equal(dropped, F.dropout(tokens, 0.25)) and not torch.equal(dropped, tokens)


@pytest.mark.parametrize('pos_embed', ['none', 'learn', *POSITIONS])
def test_only_a_position_embedding_tells_a_picture_from_its_shuffled_pixels(pos_embed):
    """Full attention with mean pooling does not see the order of tokens: whatever sees it is the position embedding."""
    model = create(pos_embed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    order = torch.randperm(36)
    shuffled = images.flatten(2)[..., order].unflatten(2, (6, 6))
    difference = (model(images) - model(shuffled)).abs().max().item()
    if pos_embed == 'none':
        assert difference < 1e-10
    else:
        assert difference > 1e-2


@pytest.mark.parametrize('class_token', [False, True])
def test_separable_positions_equal_a_learned_table_of_their_sums(class_token):
    prefix = dict(class_token=class_token, reg_tokens=1, no_embed_class=True)
    separable, learned = create('separable', **prefix), create('learn', **prefix)
    state = separable.state_dict()
    table = state.pop('position.row').unsqueeze(2) + state.pop('position.column').unsqueeze(1)  # (1, h, w, D)
    learned.load_state_dict({**state, 'pos_embed': table.flatten(1, 2)}, strict=True)
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(separable(images), learned(images))


@pytest.mark.parametrize('new_size', [(12, 12), (9, 6), (4, 15)])
def test_resized_positions_are_the_bilinear_image_of_the_old_ones(new_size):
    model = timm.create_model('test_linformer_vit', img_size=6, pos_embed='separable', proj_len=4)
    row, column = model.position.row.detach(), model.position.column.detach()
    old = (row.unsqueeze(2) + column.unsqueeze(1)).permute(0, 3, 1, 2)  # (1, D, h, w)
    model.set_input_size(new_size)
    new = model.position(torch.zeros(1, new_size[0] * new_size[1], 32), new_size).unflatten(1, new_size)
    torch.testing.assert_close(new.permute(0, 3, 1, 2), F.interpolate(old, size=new_size, mode='bilinear'))


def test_conv_positions_do_not_depend_on_the_size():
    model = timm.create_model('test_linformer_vit', pos_embed='conv')
    before = model.position.local.weight
    model.set_input_size((24, 32))
    assert model.position.local.weight is before


def test_frozen_positions_stay_frozen():
    model = timm.create_model('test_linformer_vit', pos_embed='separable').requires_grad_(False)
    model.set_input_size((24, 32))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_position_parameters_grow_with_the_sides_and_not_with_the_tokens():
    for pos_embed, expected in (('separable', (48 + 32) * 32), ('conv', 9 * 32), ('none', 0)):
        model = timm.create_model('test_linformer_vit', img_size=(48, 32), pos_embed=pos_embed)
        assert sum(p.numel() for n, p in model.named_parameters() if 'pos' in n.split('.')[0]) == expected


@pytest.mark.parametrize('name, near', [('lern', 'learn'), ('seperable', 'separable'), ('convolution', 'conv')])
def test_unknown_position_embedding_lists_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"Unknown pos_embed '{name}'. Nearest: .*{near}"):
        timm.create_model('test_linformer_vit', pos_embed=name)


@pytest.mark.parametrize('size', [2, 4])
def test_even_kernels_are_refused(size):
    with pytest.raises(ValueError, match=rf'odd side of at most 65,536, got {size}'):
        timm.create_model('test_linformer_vit', local_size=size)
