"""What else timm and torch promise of a model: tracing, compiling, precision, sharding, pruning, memory formats."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from runs import free_port, in_two_processes
from timm.layers import set_fused_attn, set_reentrant_ckpt, use_reentrant_ckpt
from timm.models.vision_transformer import VisionTransformer
from timm.utils import AttentionExtract, ModelEmaV3
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from linvision.models.projection import SHARING
from linvision.models.projection_kinds import PROJECTIONS

KINDS = [*PROJECTIONS, 'none']
QUICK = ('linear', 'separable')  # what registered models have
MARKED = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
ONE_AND_SLOW = ['separable', *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != 'separable')]


def create(name: str = 'test_linformer_vit', **kwargs) -> nn.Module:
    """A small model whose weights are far from the initial ones."""
    torch.manual_seed(0)
    arguments = dict(num_classes=5, img_size=8, proj_len=4, class_token=True) if name == 'test_linformer_vit' else {}
    model = timm.create_model(name, **{**arguments, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(n: int = 2, size: int = 8) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size)


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    out = model(images)
    (out if isinstance(out, torch.Tensor) else next(iter(out.values()))).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# Tracing and compiling


@pytest.mark.parametrize('sharing', ['layerwise', 'none'])
@pytest.mark.parametrize('kind', KINDS)
def test_fx_trace_gives_the_same_logits_and_gradients(kind, sharing):
    model = create(projection=kind, sharing=sharing).train()
    traced = create_feature_extractor(model, ['head'])
    assert torch.equal(traced(batch())['head'], model(batch()))
    torch.testing.assert_close(gradients(traced, batch()), gradients(model, batch()))


@pytest.mark.parametrize('pos_embed', ['separable', 'learn', 'none'])
def test_fx_trace_takes_every_position_embedding(pos_embed):
    model = create(pos_embed=pos_embed, pos_drop_rate=0.5)
    assert torch.equal(create_feature_extractor(model, ['head'])(batch())['head'], model(batch()))


@pytest.mark.parametrize('kind', ONE_AND_SLOW)
def test_compiled_in_one_graph_gives_the_same_logits(kind):
    model = create(projection=kind, depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(batch()), model(batch()))
    mask = torch.rand(2, 64) < 0.3
    torch.testing.assert_close(compiled(batch(), key_padding_mask=mask), model(batch(), key_padding_mask=mask))
    compiled_gradients = {k.removeprefix('_orig_mod.'): v for k, v in gradients(compiled, batch()).items()}
    torch.testing.assert_close(compiled_gradients, gradients(model, batch()))


@pytest.mark.slow
def test_compiled_by_inductor_gives_the_same_logits_and_gradients():
    model = create(row_norm=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(batch()), model(batch()), rtol=1e-4, atol=1e-5)
    compiled_gradients = {k.removeprefix('_orig_mod.'): v for k, v in gradients(compiled, batch()).items()}
    torch.testing.assert_close(compiled_gradients, gradients(model, batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # `test_export.py` has the command's own file
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('ignore')  # what onnxscript and its packages deprecate among themselves
def test_onnxruntime_agrees(kind, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs the [onnx] extra')
    pytest.importorskip('onnxscript', reason='needs the [onnx] extra')
    model = create(projection=kind, row_norm=True, depth=2)
    file = str(tmp_path / 'model.onnx')
    torch.onnx.export(
        model, (batch(),), file, dynamo=True, input_names=['x'], dynamic_shapes=({0: 'batch'},), verbose=False
    )
    session = onnxruntime.InferenceSession(file)
    for n in (1, 5):
        (logits,) = session.run(None, {session.get_inputs()[0].name: batch(n).numpy()})
        np.testing.assert_allclose(logits, model(batch(n)).detach().numpy(), rtol=1e-4, atol=1e-4)


# Features, classifier, hooks


def test_intermediate_layers_and_pruning():
    model, images = create(), batch()
    maps = model.forward_intermediates(images, indices=[0, 1], norm=True, output_fmt='NLC', intermediates_only=True)
    for ours, theirs in zip(model.get_intermediate_layers(images, n=[0, 1], norm=True), maps, strict=True):
        assert torch.equal(ours, theirs)
    before = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_head=True) == [1]
    assert len(model.blocks) == 2
    assert torch.equal(model.forward_intermediates(images, indices=[1], intermediates_only=True)[0], before)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', ['separable', 'linear', 'mean_pool', 'dynamic'])
def test_pruned_models_keep_the_projections_of_their_layers_alone(kind, sharing):
    arguments = dict(projection=kind, sharing=sharing, proj_len=4 if sharing == 'layerwise' else (4, 64, 100))
    model, images = create(**arguments), batch()
    before = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    features = timm.create_model(
        'test_linformer_vit',
        features_only=True,
        out_indices=(0, 1),
        num_classes=5,
        img_size=8,
        class_token=True,
        **arguments,
    ).eval()
    left = features.model.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and all(not k.startswith('blocks.0') for k in left.unexpected_keys)
    for ours, theirs in zip(features(images), before, strict=True):
        assert torch.equal(ours, theirs)
    assert max(features.model.projection.proj_len) == (4 if sharing == 'layerwise' else 64)
    sum(image.square().sum() for image in features(images)).backward()
    assert all(p.grad is not None for p in features.parameters())  # DDP waits for every one
    model.prune_intermediate_layers([0])
    assert torch.equal(model.forward_intermediates(images, indices=[0], intermediates_only=True)[0], before[0])
    model.set_input_size((12, 8))
    assert model.forward_features(batch(2, 12)[..., :8]).isfinite().all()


def test_reset_classifier():
    model, images = create(class_token=False), batch()
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(images), features)
    model.reset_classifier(7)
    assert torch.equal(model(images), model.head(features)) and model.num_classes == 7
    model.reset_classifier(0, '')
    assert torch.equal(model(images), model.fc_norm(model.forward_features(images)))


@pytest.mark.parametrize('kind', KINDS)
def test_timms_attention_extractor_sees_weights_over_the_rows(kind):
    set_fused_attn(False)
    model = create(projection=kind)
    for method in ('hook', 'fx'):
        maps = AttentionExtract(model, method=method)(batch())
        assert len(maps) == 3
        for weights in maps.values():
            assert weights.shape == (2, 2, 65, 65 if kind == 'none' else 5)  # (B, H, 1 + N, 1 + K)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 65))


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_works_whatever_timms_default(reentrant):
    before = use_reentrant_ckpt()
    model = create().train()
    plain = gradients(model, batch())
    try:
        set_reentrant_ckpt(reentrant)
        model.set_grad_checkpointing()
        torch.testing.assert_close(gradients(model, batch()), plain)
    finally:
        set_reentrant_ckpt(before)


# Precision and memory


@pytest.mark.parametrize('kind', KINDS)
def test_channels_last_gives_the_same_logits(kind):
    model = create(projection=kind)
    images = batch()
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', KINDS)
def test_autocast_error_is_at_most_twice_that_of_timms_vit(kind, dtype):
    arguments = dict(img_size=16, patch_size=2, embed_dim=48, depth=3, num_heads=3, class_token=True)
    plain = VisionTransformer(**arguments, num_classes=20).eval()
    ours = create(
        **arguments, num_classes=20, projection=kind, proj_len=16, local_size=0, pos_embed='learn', mlp_ratio=4
    )
    ours.load_state_dict(plain.state_dict(), strict=False)
    images = batch(16, 16)
    errors = []
    for model in (ours, plain):
        with torch.no_grad():
            exact = model.double()(images.double())
            model.float()
            with torch.autocast('cpu', dtype):
                low = model(images)
            errors.append((low - exact).norm() / exact.norm())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize('dtype', [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16])
@pytest.mark.parametrize('training', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_overflows_at_65536_tokens(dtype, training):
    model = create(img_size=256, depth=1, embed_dim=16, proj_len=256, projection='separable').to(dtype)
    images = (3 + batch(1, 256)).to(dtype)  # a sum over the tokens would pass 65,504
    if not training:
        with torch.no_grad():
            low = model(images).float()
            exact = model.float()(images.float())
        assert (low - exact).norm() < 0.05 * exact.norm()
        return
    model.train()(images).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(w.grad.any() for w in model.projection.weights)


@pytest.mark.parametrize('kind', ['linear', 'conv', 'mean_pool', 'max_pool', 'dynamic'])
@pytest.mark.parametrize('dtype', [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16])
def test_other_projections_do_not_overflow_at_65536_tokens(kind, dtype):
    model = create(img_size=256, depth=1, embed_dim=16, proj_len=64, projection=kind).to(dtype)
    with torch.no_grad():
        low = model(images := (3 + batch(1, 256)).to(dtype)).float()
        exact = model.float()(images.float())
    assert (low - exact).norm() < 0.05 * exact.norm()


# Averages and shards


def test_moving_average_follows_the_model():
    model = create()
    ema = ModelEmaV3(model, decay=0.5)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, old[name] + 0.5)
    assert not torch.equal(ema.module(batch()), model(batch()))


WAYS = [
    *itertools.product(['fsdp', 'ddp'], [False, True], [0, 16], ['separable']),  # gradient checkpointing, chunk size
    *itertools.product(['fsdp', 'ddp'], [False], [0, 16], ['dynamic']),
]


def shard(rank: int, port: int, folder: str) -> None:
    """One of two processes: a step on its half of the batch in each of `WAYS`; rank 0 writes the gradients."""
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh('cpu', (2,))
        for i, (parallel, checkpointing, chunk_size, kind) in enumerate(WAYS):
            model = create(projection=kind).train()
            model.set_grad_checkpointing(checkpointing)
            model.set_chunk_size(chunk_size)
            step = model
            if parallel == 'fsdp':
                for block in model.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
            else:
                step = nn.parallel.DistributedDataParallel(model)
            step(batch(4).chunk(2)[rank]).square().mean().backward()
            whole = {n: p.grad.full_tensor() if parallel == 'fsdp' else p.grad for n, p in model.named_parameters()}
            if rank == 0:
                torch.save(whole, Path(folder) / f'gradients_{i}.pt')
            dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort Python's own exit ("terminate called without an active exception")


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    """A folder with the gradients of two processes, one file for each of `WAYS`."""
    folder = tmp_path_factory.mktemp('gradients')
    in_two_processes(shard, free_port(), str(folder))
    return folder


@pytest.mark.parametrize('way', range(len(WAYS)), ids=[f'{k}-{p}-checkpointing={c}-chunk={s}' for p, c, s, k in WAYS])
def test_two_processes_give_the_gradients_of_one(way, sharded):
    found = torch.load(sharded / f'gradients_{way}.pt', weights_only=True)
    model = create(projection=WAYS[way][-1]).train()
    model(batch(4)).square().mean().backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
