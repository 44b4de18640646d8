"""Fused products equal the plain block, for what they take and where they hand over to it."""

from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from linvision.streaming import cpu_kernels

pytestmark = pytest.mark.skipif(not cpu_kernels.supports(torch.float32), reason='this PyTorch has no oneDNN')


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Images of 48 tokens count as long."""
    monkeypatch.setattr(cpu_kernels, 'LONG', 6)


@pytest.fixture
def used(monkeypatch) -> list[bool]:
    """Whether each block was fused."""
    seen, applies = [], cpu_kernels.applies
    monkeypatch.setattr(cpu_kernels, 'applies', lambda *args: seen.append(applies(*args)) or seen[-1])
    return seen


def create(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    arguments = dict(num_classes=5, img_size=(8, 6), proj_len=6, chunk_size=0, qkv_bias=True, local_grid=0)
    model = timm.create_model('test_linformer_vit', **{**arguments, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def batch(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 8, 6, generator=torch.Generator().manual_seed(1))


OPTIONS = [
    dict(),
    dict(projection='linear', sharing='none'),
    dict(projection='none'),
    dict(class_token=True, reg_tokens=2, global_pool='token'),
    dict(qkv_bias=False, proj_bias=False),
    dict(local_size=0, init_values=0.5, pos_embed='learn'),
    dict(act_layer=partial(nn.GELU, approximate='tanh')),
    dict(scale_attn_norm=True),
    dict(img_size=(8, 6), local_grid=(2, 2)),
    dict(token_norm=True),
]


@pytest.mark.parametrize('kwargs', OPTIONS, ids=lambda o: '-'.join(o) or 'default')
def test_fused_equals_plain(kwargs, used):
    model = create(**kwargs)
    with torch.no_grad():
        plain = model(batch())
        for chunk in (6, 24, 100, 1000):
            model.set_chunk_size(chunk)
            torch.testing.assert_close(model(batch()), plain, rtol=2e-4, atol=2e-5)
    assert any(used)


@pytest.mark.parametrize('hidden', cpu_kernels.OPERATORS)
def test_without_one_of_its_operators_the_model_runs_on_plain_pytorch(hidden, monkeypatch, used):
    model = create(chunk_size=24)
    with torch.no_grad():
        wanted = model(batch())
        assert all(used)
        others = {name: getattr(torch.ops.mkldnn, name) for name in cpu_kernels.OPERATORS if name != hidden}
        monkeypatch.setattr(torch.ops, 'mkldnn', SimpleNamespace(**others))
        cpu_kernels.supports.cache_clear()
        used.clear()
        found = model(batch())
    cpu_kernels.supports.cache_clear()
    assert used and not any(used)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)


def test_the_callers_tensor_and_the_parameters_stay_as_they_are(used):
    model, images = create(chunk_size=24), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        first = model(images)
        assert torch.equal(images, batch()) and torch.equal(model(images), first) and all(used)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('autocast', [False, True])
def test_bf16_errs_at_most_twice_as_much_as_plain_bf16(autocast, used):
    if not cpu_kernels.supports(torch.bfloat16):
        pytest.skip(reason='this CPU has no bf16 products')
    model = create(img_size=(32, 32), proj_len=16, embed_dim=64)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model(images)
        low = model if autocast else model.bfloat16()
        images = images if autocast else images.bfloat16()
        errors = []
        for chunk in (0, 512):
            low.set_chunk_size(chunk)
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                errors.append((low(images).float() - exact).square().mean().sqrt())
    assert all(used) and errors[1] <= 2 * errors[0]


@pytest.mark.parametrize(
    'kwargs', [dict(qk_norm=True), dict(act_layer='relu'), dict(mlp_layer='swiglu')], ids=lambda o: next(iter(o))
)
def test_other_blocks_are_run_as_they_are(kwargs, used):
    if 'mlp_layer' in kwargs:
        kwargs = dict(mlp_layer=timm.layers.SwiGLU)
    model = create(**kwargs)
    with torch.no_grad():
        plain = model(batch())
        model.set_chunk_size(24)
        torch.testing.assert_close(model(batch()), plain, rtol=1e-4, atol=1e-5)
    assert used and not any(used)


@pytest.mark.parametrize('name', ['attn.proj', 'mlp.fc1', 'mlp.fc2'])
def test_adapters_of_linear_layers_have_their_effect(name, used):
    model = create()
    for block in model.blocks:
        block.set_submodule(name, Adapter(block.get_submodule(name)))
    with torch.no_grad():
        plain = model(batch())
        model.set_chunk_size(24)
        torch.testing.assert_close(model(batch()), plain, rtol=1e-4, atol=1e-5)
    assert used and not any(used)


class Adapter(nn.Module):
    """A linear layer and a low-rank one beside it, with the layer's attributes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def test_training_mode_and_padding_are_run_as_they_are(used):
    model = create(chunk_size=24, proj_drop_rate=0.5)
    with torch.no_grad():
        model(batch(), key_padding_mask=torch.zeros(3, 48, dtype=torch.bool))
        assert torch.equal(model(batch()), model(batch()))
        del used[:]
        model.train()(batch())
    assert not any(used)


class Int8(torch.Tensor):
    """A weight kept as int8 with a scale, which is multiplied out where a product asks for it, as torchao's are."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        if func is torch.ops.aten.slice.Tensor:  # which torchao's have, and not split
            return cls(func(args[0].numbers, *args[1:]), args[0].scale)
        if func not in (torch.ops.aten.t.default, torch.ops.aten.linear.default):
            raise NotImplementedError(func)
        return func(*(x.numbers * x.scale if isinstance(x, cls) else x for x in args), **kwargs or {})


def test_weights_of_another_class_keep_their_own_products(used):
    model, images = create(), batch()
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    for layer in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2):
        scale = layer.weight.detach().abs().max() / 127
        weight = Int8((layer.weight.detach() / scale).round().to(torch.int8), scale)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        whole = model(images)
        model.set_chunk_size(16)
        torch.testing.assert_close(model(images), whole)
    assert not any(used[: len(used) // len(model.blocks)]) and any(used)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['test_linformer_vit', 'linformer_vit_pico_patch1_32'])
@pytest.mark.parametrize('config', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
def test_a_model_that_torchao_quantised_runs(name, config):
    quantization = pytest.importorskip('torchao.quantization')
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    with torch.no_grad():
        whole = model(images)
        quantization.quantize_(model, getattr(quantization, config)())
        for chunk_size in (0, 64):
            model.set_chunk_size(chunk_size)
            assert (model(images) - whole).abs().max() < 0.1 * whole.abs().max()
        if config == 'Int8WeightOnlyConfig':  # of no images torchao 0.18 finds no scale, in any model
            assert model(images[:0]).shape == (0, 5)


def test_short_images_keep_pytorchs_attention(monkeypatch):
    model, made = create(chunk_size=24), []
    attention = cpu_kernels.FusedAttention
    monkeypatch.setattr(cpu_kernels, 'FusedAttention', lambda *args: made.append(1) or attention(*args))
    for longest, times in ((48, 3), (49, 0)):  # tokens of an image; blocks
        monkeypatch.setattr(cpu_kernels, 'LONG', longest)
        made.clear()
        with torch.no_grad():
            model(batch(1))
        assert len(made) == times


def test_without_fused_kernels_a_model_has_second_derivatives():
    """A penalty on the gradient of 2,304 tokens, as float64 has it, whose products are plain in any case."""
    found = []
    for dtype in (torch.float64, torch.float32):
        timm.layers.set_fused_attn(False)
        torch.manual_seed(0)
        model = timm.create_model('test_linformer_vit', img_size=48, depth=1, num_classes=3).to(dtype)
        timm.layers.set_fused_attn(True)  # the model keeps what it was made with
        images = torch.randn(1, 3, 48, 48, dtype=torch.float64).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
        gradient.square().sum().backward()
        found.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    assert 'blocks.0.mlp.fc1.weight' in found[0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)
