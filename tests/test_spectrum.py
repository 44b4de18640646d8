"""How low-rank attention is, against brute force in float64."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from linvision.analysis.attention_map import projection_matrices
from linvision.analysis.spectrum import Spectrum, attention_spectrum, own_projection, pooling
from linvision.cli import spectrum as command
from linvision.cli.images import ImagesOf
from linvision.convert import from_vit

SMALL = {'img_size': 32, 'patch_size': 4, 'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'num_classes': 5}


def vit(**arguments):
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', **{**SMALL, **arguments}).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float('norm' in name and 'weight' in name), 0.3)
    return model


def matrices(model, images):
    """The attention matrix of the image's tokens, by the definition, in float64: a list of (B, H, N, N)."""
    found, seen = [], []
    hooks = [block.attn.register_forward_hook(lambda _, x, y: seen.append(x[0])) for block in model.blocks]
    with torch.no_grad():
        model.forward_features(images)
    for hook in hooks:
        hook.remove()
    for block, x in zip(model.blocks, seen, strict=True):
        attn = block.attn
        q, k, _ = attn.qkv(x[:, model.num_prefix_tokens :]).chunk(3, -1)
        q, k = (y.detach().unflatten(-1, (3, 16)).transpose(1, 2) for y in (q, k))
        q, k = attn.q_norm(q).detach().double(), attn.k_norm(k).detach().double()
        found.append((q @ k.transpose(-1, -2) / 4).softmax(-1))
    return found


@pytest.mark.parametrize('arguments', [{}, {'qk_norm': True}, {'class_token': False, 'global_pool': 'avg'}])
def test_shares_are_those_of_the_singular_values_of_the_matrices(arguments):
    model, images = vit(**arguments), torch.randn(3, 3, 32, 32)
    spectrum = attention_spectrum(model, [images[:1], images[1:]])
    assert spectrum.tokens == 64 and spectrum.num_samples == 3 and spectrum.projected is None
    for layer, P in enumerate(matrices(model, images)):
        values = torch.linalg.svdvals(P)
        energy = (values**2).cumsum(-1) / (values**2).sum(-1, keepdim=True)
        torch.testing.assert_close(spectrum.energy[layer], energy.mean(0), rtol=1e-4, atol=1e-4)
        cumulative = values.cumsum(-1) / values.sum(-1, keepdim=True)
        torch.testing.assert_close(spectrum.cumulative[layer], cumulative.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('exact', [1000, 10])
def test_models_of_any_dtype_have_the_spectrum_of_their_queries_and_keys(exact, dtype):
    model, images = vit(), torch.randn(1, 3, 32, 32)
    whole = attention_spectrum(model, [images], 12, pooling(model, 16), exact)
    found = attention_spectrum(model.to(dtype), [images.to(dtype)], 12, pooling(model, 16), exact)
    torch.testing.assert_close(found.energy, whole.energy, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.projected, whole.projected, rtol=0.02, atol=0.02)


def test_the_best_matrix_of_rank_k_misses_what_the_energy_says():
    model, images = vit(), torch.randn(1, 3, 32, 32)
    spectrum = attention_spectrum(model, [images])
    P = matrices(model, images)[1][0]
    U, S, V = torch.linalg.svd(P)
    best = (U[..., :5] * S[..., None, :5]) @ V[..., :5, :]
    error = (P - best).square().sum((-1, -2)) / P.square().sum((-1, -2))
    torch.testing.assert_close(spectrum.energy[1, :, 4], 1 - error, rtol=1e-4, atol=1e-4)


def test_products_by_chunks_find_the_largest_singular_values(monkeypatch):
    monkeypatch.setattr('linvision.analysis.spectrum.CHUNK_NUMBERS', 3 * 64 * 10)  # 7 chunks of 64 tokens
    model, images = vit(), torch.randn(2, 3, 32, 32)
    whole = attention_spectrum(model, [images])
    found = attention_spectrum(model, [images], rank=12, exact=10)
    assert found.cumulative is None and found.energy.shape == (2, 3, 12)
    torch.testing.assert_close(found.energy, whole.energy[..., :12], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('kind', ['linear', 'dynamic'])
@pytest.mark.parametrize('sharing', ['layerwise', 'headwise', 'none'])
def test_a_projection_keeps_what_its_matrix_does_and_never_more_than_the_best(kind, sharing):
    model, images = vit(), torch.randn(2, 3, 32, 32)
    converted = from_vit(model, 16, kind, sharing)
    for parameter in converted.projection.parameters():
        torch.nn.init.normal_(parameter, 1 / 16, 0.05)
    full = from_vit(model, projection='none')
    for exact in (1000, 10):
        spectrum = attention_spectrum(full, [images], 16, own_projection(converted), exact=exact)
        for layer, P in enumerate(matrices(model, images)):
            seen = []
            hook = model.blocks[layer].attn.register_forward_hook(lambda _, x, y, seen=seen: seen.append(x[0]))
            with torch.no_grad():
                model.forward_features(images)
            hook.remove()
            E, F = (m.detach().double() for m in projection_matrices(converted, layer, seen[0]))
            if kind == 'dynamic' and sharing != 'none':
                E, F = E.unsqueeze(1), F.unsqueeze(1)  # (B, 1, K, N)
            q, k, _ = model.blocks[layer].attn.qkv(seen[0][:, 1:]).detach().double().chunk(3, -1)
            q, k = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in (q, k))
            made = (q @ (E @ k).transpose(-1, -2) / 4).softmax(-1) @ F
            kept = 1 - (P - made).square().sum((-1, -2)) / P.square().sum((-1, -2))
            torch.testing.assert_close(spectrum.projected[layer], kept.mean(0), rtol=1e-3, atol=1e-3)
        assert (spectrum.projected <= spectrum.energy[..., 15] + 1e-4).all()


def test_pooling_with_as_many_rows_as_tokens_keeps_all():
    model = vit()
    spectrum = attention_spectrum(model, [torch.randn(1, 3, 32, 32)], projection=pooling(model, 64))
    torch.testing.assert_close(spectrum.projected, torch.ones(2, 3).double(), rtol=1e-5, atol=1e-5)


def test_the_recommended_k_is_the_smallest_that_loses_no_more():
    energy = torch.tensor([[[0.5, 0.8, 0.95, 1.0], [0.7, 0.9, 0.97, 1.0]], [[0.9, 0.99, 1.0, 1.0]] * 2])
    spectrum = Spectrum(4, energy, None, None, 1)
    assert Spectrum(4, energy - 5e-16, None, None, 1).lengths(0.0) == [4, 3]  # as rounding leaves it
    assert spectrum.lengths(0.15) == [2, 1] and spectrum.lengths(0.149) == [3, 1] and spectrum.lengths(0.0) == [4, 3]
    with pytest.raises(ValueError, match='lose up to 0.150 of the energy, more than 0.1'):
        Spectrum(9, energy[..., :2], None, None, 1).lengths(0.1)


def test_the_table_shows_the_head_that_needs_most():
    energy = torch.tensor([[[0.99, 0.995, 1.0, 1.0], [0.5, 0.705, 0.991, 1.0]]])
    line = command.table(Spectrum(4, energy, None, torch.ones(1, 2), 1), 2, 'pooling').splitlines()[-1]
    assert line == '| 0 | 1 | 3 | 3 | 3 | 3 | 85.0 % | 100.0 % |'
    energy = energy.clone()
    energy[0, 1, 2] = 0.981  # the mean has 99 % at K = 3, this head not before K = 4
    line = command.table(Spectrum(4, energy, None, torch.ones(1, 2), 1), 2, 'pooling').splitlines()[-1]
    assert line == '| 0 | 1 | 3 | 3 | 3 | 4 | 85.0 % | 100.0 % |'


def test_looking_into_a_model_leaves_it_and_the_random_numbers_as_they_were():
    model, state = vit().train(), torch.get_rng_state()
    first, second = (attention_spectrum(model, [torch.ones(1, 3, 32, 32)], rank=4, exact=0) for _ in range(2))
    assert torch.equal(first.energy, second.energy) and torch.equal(torch.get_rng_state(), state)
    assert model.training
    with pytest.raises(ValueError, match='no images to look at'):
        attention_spectrum(model, [])


def test_models_without_such_attention_are_refused():
    for name in ('resnet18', 'eva02_tiny_patch14_224'):
        with pytest.raises(ValueError, match='no attention that can be looked into'):
            attention_spectrum(timm.create_model(name), [])


def test_the_command_writes_what_the_function_finds(tmp_path, capsys):
    save_for_hf(vit(in_chans=1, img_size=16, patch_size=2), str(tmp_path / 'vit'), safe_serialization=True)
    original = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True)
    flags = {'dataset': 'fake', 'limit': 6, 'batch_size': 4, 'device': 'cpu', 'proj_len': 16, 'recommend': 0.2}
    command.main(str(tmp_path / 'vit'), tmp_path / 'out', **flags)
    report = json.loads((tmp_path / 'out/spectrum.json').read_text())
    images = ImagesOf(original, 'fake', tmp_path, 4, torch.device('cpu'))
    found = attention_spectrum(original, images.test(6), projection=pooling(original, 16))
    torch.testing.assert_close(torch.tensor(report['energy']), found.energy.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(report['projected']), found.projected.float(), rtol=1e-2, atol=1e-3)
    assert report['recommended']['proj_len'] == found.lengths(0.2) and report['num_samples'] == 6
    said = capsys.readouterr().out
    assert f'proj_len={found.lengths(0.2)}' in said and 'pooling to 16 rows' in said
    lengths = report['recommended']['proj_len']
    assert [b.attn.rows[0] * b.attn.rows[1] for b in from_vit(original, lengths, sharing='key_value').blocks] == lengths
    assert (tmp_path / 'out/spectrum.png').stat().st_size > 10_000 and list((tmp_path / 'out').glob('events*'))


def test_the_command_refuses_a_k_that_cannot_be(tmp_path):
    save_for_hf(vit(in_chans=1), str(tmp_path / 'vit'), safe_serialization=True)
    with pytest.raises(ValueError, match='between 1 and the 64 tokens, got 65'):
        command.main(str(tmp_path / 'vit'), tmp_path, proj_len=65, device='cpu')
    save_for_hf(from_vit(vit(in_chans=1), 16), str(tmp_path / 'ours'), safe_serialization=True)
    with pytest.raises(ValueError, match='projects to 16 rows, and not to 8'):
        command.main(str(tmp_path / 'ours'), tmp_path, proj_len=8, device='cpu')
    save_for_hf(timm.create_model('resnet10t'), str(tmp_path / 'resnet'), safe_serialization=True)
    with pytest.raises(ValueError, match='ResNet has no attention'):
        command.main(str(tmp_path / 'resnet'), tmp_path, device='cpu')


def test_the_command_looks_at_as_many_pooled_rows_as_a_model_with_normalised_rows_has(tmp_path, capsys):
    model = timm.create_model('test_linformer_vit', in_chans=1, proj_len=9, row_norm=True)
    save_for_hf(model, str(tmp_path / 'model'), safe_serialization=True)
    command.main(str(tmp_path / 'model'), tmp_path, dataset='fake', limit=2, device='cpu')
    assert 'pooling to 9 rows' in capsys.readouterr().out
