"""Pictures of a model: the lifted attention is what the block computes with, and the files are there."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models import save_for_hf

from linvision.analysis.attention_map import attention_maps, projection_matrices
from linvision.cli import visualize
from linvision.models.projection import SHARING
from linvision.models.projection_kinds import PROJECTIONS


def model_of(**arguments):
    torch.manual_seed(0)
    settings = {'local_size': 0, 'row_norm': False, 'proj_len': 9, 'img_size': (8, 12), 'qkv_bias': True}
    model = timm.create_model('test_linformer_vit', **{**settings, **arguments}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize('sharing', ['layerwise', 'headwise', 'none'])
@pytest.mark.parametrize('kind', ['linear', 'separable', 'mean_pool', 'dynamic', 'none'])
@torch.no_grad()
def test_lifted_attention_times_the_tokens_values_is_what_attention_puts_out(kind, sharing):
    model = model_of(projection=kind, sharing=sharing)
    images, attention, seen = torch.randn(2, 3, 8, 12), model.blocks[1].attn, []
    hooks = [attention.register_forward_hook(lambda _, x, y: seen.append(x[0]))]
    hooks += [attention.proj.register_forward_hook(lambda _, x, y: seen.append(x[0]))]
    model(images)
    for hook in hooks:
        hook.remove()
    heads, tokens = seen  # what enters the output projection comes first
    D = tokens.shape[-1]
    values = F.linear(tokens, attention.qkv.weight[2 * D :], attention.qkv.bias[2 * D :])
    values = values.unflatten(-1, (2, -1)).transpose(1, 2)  # (B, H, N, D/H)
    one = attention_maps(model, images, 1, (3, 7), per_head=True).flatten(2)  # (B, H, N)
    wanted = (one.unsqueeze(2) @ values).squeeze(2).flatten(1)
    torch.testing.assert_close(wanted, heads[:, 3 * 12 + 7], rtol=1e-4, atol=1e-4)
    every = attention_maps(model, images, 1, per_head=True)
    wanted = (every.flatten(2).unsqueeze(2) @ values).squeeze(2).flatten(1)
    torch.testing.assert_close(wanted, heads.mean(1), rtol=1e-4, atol=1e-4)
    fused = model.blocks[1].attn.fused_attn
    torch.testing.assert_close(attention_maps(model.train(), images, 1), every.mean(1))
    assert model.training and model.blocks[1].attn.fused_attn == fused


@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', [kind for kind in PROJECTIONS if kind != 'dynamic'])  # whose matrix is an image's own
@torch.no_grad()
def test_lifted_attention_is_attention_times_the_matrix_written_out(kind, sharing):
    model = model_of(projection=kind, sharing=sharing, class_token=True, global_pool='token')
    images, attention, grid, seen = torch.randn(2, 3, 8, 12), model.blocks[1].attn, (8, 12), []
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_hook(lambda _, x, y: seen.append(y[..., 1:]))  # (B, H, 1 + N, K)
    model(images)
    hook.remove()
    if kind in ('conv', 'max_pool'):
        E = F.avg_pool2d(torch.eye(96).view(96, 1, 8, 12), (3, 4), ceil_mode=True).flatten(1).T  # (K, N)
    else:
        factors = model.projection_tensors(images, grid)[1]
        n = len(factors) // attention.matrices
        E = attention.reduce(torch.eye(96), factors[-n:-1], grid, (3, 3))  # (K, N) or (H, K, N)
    maps = attention_maps(model, images, 1, (3, 7), per_head=True).flatten(2)  # (B, H, N)
    torch.testing.assert_close(maps, (seen[0][:, :, 1 + 3 * 12 + 7].unsqueeze(2) @ E).squeeze(2))
    torch.testing.assert_close(projection_matrices(model, 1)[1], E)


@torch.no_grad()
def test_maps_of_a_model_of_any_size_are_on_the_grid_of_its_images():
    dynamic, images = model_of(dynamic_img_size=True, proj_len=120), torch.randn(2, 3, 16, 8)
    resized = model_of(proj_len=120)
    resized.load_state_dict(dynamic.state_dict())
    resized.set_input_size((16, 8))  # 128 tokens, above K, where 8 × 12 were not
    for query in (None, (15, 7)):
        torch.testing.assert_close(
            attention_maps(dynamic, images, query=query), attention_maps(resized, images, query=query)
        )
    with pytest.raises(IndexError, match=r'token grid of 16×8, got \(0, 8\)'):
        attention_maps(dynamic, images, query=(0, 8))


@pytest.mark.parametrize('kind', ['linear', 'separable', 'max_pool'])
def test_65536_tokens_give_a_map(kind):
    model = model_of(img_size=256, projection=kind, depth=1, embed_dim=8, proj_len=16)
    with torch.inference_mode():
        found = attention_maps(model, torch.randn(1, 3, 256, 256))
    assert found.shape == (1, 256, 256) and found.any() and found.isfinite().all()


def test_no_such_block_or_token():
    model = model_of()
    with pytest.raises(IndexError, match='one of the 3 there are, got 3'):
        attention_maps(model, torch.randn(1, 3, 8, 12), 3)
    with pytest.raises(IndexError, match=r'token grid of 8×12, got \(8, 0\)'):
        attention_maps(model, torch.randn(1, 3, 8, 12), query=(8, 0))


@torch.no_grad()
def test_positions_are_those_that_are_added_to_the_tokens():
    for positions in ('learn', 'separable'):
        model = model_of(pos_embed=positions, class_token=True, global_pool='token')
        table, blank = visualize.position_table(model), torch.zeros(1, 3, 8, 12)
        tokens = model.embed(blank)[0][0, 1:]
        bare = model.patch_embed(blank)[0]
        torch.testing.assert_close(tokens - bare, table, rtol=1e-4, atol=1e-5)
    assert visualize.position_table(model_of()) is None  # by convolution


def test_pictures_are_written_and_logged(tmp_path):
    net = model_of(pos_embed='separable', img_size=16, num_classes=0)
    save_for_hf(net, str(tmp_path / 'model'), safe_serialization=True)
    for i in range(3):
        Image.new('RGB', (20, 16), (80 * i, 10, 10)).save(tmp_path / f'{i}.png')
    with pytest.raises(ValueError, match='block must be one of the 3 that the model has, from 0, got 3'):
        visualize.main(str(tmp_path / 'model'), [tmp_path], tmp_path / 'out', block=3)
    visualize.main(str(tmp_path / 'model'), [tmp_path], tmp_path / 'out', block=0, limit=2)
    names = {'attention_blocks', 'attention_heads', 'projection', 'positions'}
    assert {path.stem for path in (tmp_path / 'out').glob('*.png')} == names
    for name in names:
        with Image.open(tmp_path / 'out' / f'{name}.png') as image:
            low, high = image.convert('L').getextrema()
        assert high - low > 100
    log = EventAccumulator(str(tmp_path / 'out'), size_guidance={'images': 0}).Reload()
    assert set(log.Tags()['images']) == names


def test_titles_name_the_image_and_its_likeliest_class():
    net = model_of(img_size=16, num_classes=3)
    net.pretrained_cfg['label_names'] = ('ship', 'airplane', 'frog')
    titles = visualize.titles(net, torch.randn(1, 3, 16, 16), [Path('data/ship/0003.png')])
    assert re.fullmatch(r'ship/0003\n→ (ship|airplane|frog) \d+ %', titles[0])
    assert visualize.titles(model_of(num_classes=0), torch.randn(1, 3, 8, 12), [Path('a.png')]) == ['a']


def test_a_model_of_another_kind_is_refused(tmp_path):
    save_for_hf(timm.create_model('test_vit'), str(tmp_path), safe_serialization=True)
    with pytest.raises(ValueError, match="got VisionTransformer: see timm's AttentionExtract"):
        visualize.main(str(tmp_path), [tmp_path])


def test_maps_are_alike_whatever_their_scale_and_mean_are():
    maps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert visualize.are_alike([maps[:1], 2 * maps[:1] + 1]) and not visualize.are_alike([maps[:1], maps[1:]])
