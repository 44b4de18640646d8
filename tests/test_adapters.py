"""Adapters of peft on every linear layer, `qkv` among them: they count, they learn, they merge, they are saved."""

import copy
import importlib.util

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from linvision.convert import from_vit

# which each function imports for itself: it brings transformers, seconds for each process that collects tests
pytestmark = pytest.mark.skipif(importlib.util.find_spec('peft') is None, reason='needs peft')

TARGETS = (['qkv'], 'all-linear')
ADAPTERS = [(targets, dora) for targets in TARGETS for dora in (False, True)]
NAMES = [f'{"-".join(t) if isinstance(t, list) else t}{"-dora" * dora}' for t, dora in ADAPTERS]


def adapted(model: nn.Module, targets: list[str] | str, dora: bool, **kwargs) -> nn.Module:
    """A model with an adapter whose every weight is random: by its start it would do nothing."""
    import peft

    config = peft.LoraConfig(target_modules=targets, r=3, use_dora=dora, **kwargs)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'lora_' in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def small(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    arguments = {'img_size': 8, 'proj_len': 4, 'class_token': True, 'dtype': torch.float64, 'num_classes': 5}
    return timm.create_model('test_linformer_vit', **{**arguments, **kwargs})


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By the names that peft gives, of all that learns."""
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('chunk_size', [0, 16])
@pytest.mark.parametrize(
    'shape',
    [{}, {'sharing': 'headwise', 'qkv_bias': False}, {'sharing': 'none', 'projection': 'conv'}, {'projection': 'none'}],
)
@pytest.mark.parametrize('targets, dora', ADAPTERS, ids=NAMES)
def test_an_adapter_gives_the_outputs_of_the_merged_weight(targets, dora, shape, chunk_size):
    model = adapted(small(chunk_size=chunk_size, **shape), targets, dora)
    before = small(**shape)(images())
    learning, still = model.train()(images()), None
    with torch.no_grad():
        still = model.eval()(images())
    merged = model.merge_and_unload()
    assert all(type(block.attn.qkv) is nn.Linear for block in merged.blocks)
    wanted = merged(images())
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(learning, wanted)
    torch.testing.assert_close(still, wanted)


def test_weights_that_a_hook_makes_are_those_of_now():
    """As `torch.nn.utils.prune` makes them before each call of the layer: weight = mask · weight_orig."""
    model = small()
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, 'weight', 0.5)
        with torch.no_grad():
            block.attn.qkv.weight_orig.add_(torch.randn_like(block.attn.qkv.weight_orig))  # a step of training
    torch.fx.symbolic_trace(model)  # a proxy is asked for nothing
    found = model(images())
    found.square().sum().backward()
    for block in model.blocks:
        assert torch.equal(block.attn.qkv.weight_orig.grad == 0, block.attn.qkv.weight_mask == 0)
        prune.remove(block.attn.qkv, 'weight')
    torch.testing.assert_close(found, model(images()))


@pytest.mark.parametrize('chunk_size', [0, 8])
@pytest.mark.parametrize('targets, dora', ADAPTERS, ids=NAMES)
def test_an_adapter_of_full_attention_learns_as_that_of_timms_vit(targets, dora, chunk_size):
    plain = timm.create_model(
        'vit_tiny_patch16_224', img_size=8, patch_size=2, embed_dim=24, depth=2, num_heads=3, num_classes=5
    ).double()
    ours = from_vit(plain, projection='none')
    ours.set_chunk_size(chunk_size)
    found = gradients(adapted(ours, targets, dora), images())
    wanted = gradients(adapted(plain, targets, dora), images())
    assert any('qkv.lora_A' in name for name in wanted) and dora == any('magnitude' in name for name in wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize('dora', [False, True])
def test_streamed_adapters_and_an_e_that_learns_have_the_gradients_of_whole_blocks(dora):
    whole = adapted(small(), 'all-linear', dora, modules_to_save=['projection'])
    streamed = adapted(small(chunk_size=16), 'all-linear', dora, modules_to_save=['projection'])
    wanted = gradients(whole, images())
    assert any('projection' in name for name in wanted) and all(g is not None for g in wanted.values())
    torch.testing.assert_close(gradients(streamed, images()), wanted)


def test_the_weight_of_a_wrapper_is_asked_for_once_a_pass_however_many_chunks():
    model = adapted(small(chunk_size=8), ['qkv'], False)
    calls = []
    layer = model.base_model.model.blocks[0].attn.qkv
    forward = layer.forward
    layer.forward = lambda x: calls.append(x.shape) or forward(x)
    with torch.no_grad():
        model(images()[:1])
    assert calls == [(34, 32)]  # zero, a probe and the identity


@pytest.mark.parametrize('dora', [False, True])
def test_an_adapter_is_saved_and_loaded(dora, tmp_path):
    model = adapted(small(), 'all-linear', dora)
    model.save_pretrained(str(tmp_path))
    import peft

    loaded = peft.PeftModel.from_pretrained(small(), str(tmp_path))
    assert torch.equal(loaded(images()), model(images()))
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(images()), small()(images()))


def test_dropout_before_the_adapter_of_qkv_is_refused_in_training_alone():
    model = adapted(small(), ['qkv'], False, lora_dropout=0.1)
    with pytest.raises(TypeError, match=r'lora_dropout.default drops a share of 0\.1.*lora_dropout of peft'):
        model.train()(images())
    assert model.eval()(images()).isfinite().all()
    others = adapted(small(), ['proj', 'fc1', 'fc2'], False, lora_dropout=0.1)
    assert others.train()(images()).isfinite().all()


def test_an_adapter_under_autocast_has_at_most_twice_the_error_of_the_merged_weight():
    model = adapted(small(dtype=torch.float32), 'all-linear', False)
    merged = copy.deepcopy(model).merge_and_unload()
    errors, x = [], torch.randn(64, 3, 8, 8)  # three images' error is chance
    for one in (model, merged):
        with torch.no_grad():
            exact = copy.deepcopy(one).double()(x.double())
            with torch.autocast('cpu', torch.bfloat16):
                errors.append((one(x) - exact).norm())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.slow
def test_a_model_with_adapters_is_compiled_in_one_graph():
    model = adapted(small(depth=1), 'all-linear', False)  # dynamo cannot read peft's DoRA
    wanted = gradients(model, images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(images()), model(images()))
    found = {name.removeprefix('_orig_mod.'): g for name, g in gradients(compiled, images()).items()}
    torch.testing.assert_close(found, wanted)
