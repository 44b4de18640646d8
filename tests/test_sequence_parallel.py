"""Processes that share an image give the logits and gradients of one; what they send a layer does not grow with N."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import free_port, slow_but
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from linvision.models.band import Band, check_shared
from linvision.models.projection_kinds import PROJECTIONS

COUNT = 4
QUICK = ('linear', 'separable', 'max_pool', 'dynamic')
# 10 rows of tokens on 4 processes: 3, 3, 2 and 2
CREATE = dict(img_size=(10, 8), num_classes=3, proj_len=16, depth=2, embed_dim=16, chunk_size=0, dtype=torch.float64)
PREFIX = dict(class_token=True, reg_tokens=1)
STREAMED = dict(chunk_size=20)  # two rows of the token grid
LOCAL = dict(local_size=3, padded=True)
CASES: dict[str, dict[str, Any]] = {
    # a norm of the rows would hide a shift of them
    **{kind: dict(projection=kind, row_norm=kind != 'max_pool', **LOCAL, **PREFIX) for kind in QUICK},
    'dynamic, streamed': dict(projection='dynamic', depth=1, **LOCAL, **STREAMED),
    'by head': dict(projection='dynamic', sharing='none', padded=True, **PREFIX),
    'headwise': dict(projection='linear', sharing='headwise', row_norm=True),
    'table of positions': dict(pos_embed='learn', **PREFIX),
    'taps two apart, streamed': dict(local_grid=5, depth=1, **LOCAL, **PREFIX, **STREAMED),
    'a reach over several bands': dict(local_size=9, **PREFIX),
    'drop path': dict(drop_path_rate=0.5, drop_rate=0.5),
    'checkpointed': dict(local_size=3, checkpointed=True),
    'norms over all tokens, streamed': dict(token_norm=True, depth=1, **LOCAL, **STREAMED),
    'two processes': dict(count=2, **LOCAL, **PREFIX),
}
SLOW_CASES: dict[str, dict[str, Any]] = {
    **{kind: dict(projection=kind, **LOCAL, **PREFIX) for kind in PROJECTIONS if kind not in QUICK},
    **{f'{kind}, streamed': dict(projection=kind, **LOCAL, **PREFIX, **STREAMED) for kind in PROJECTIONS},
    **{f'{kind} by head': dict(projection=kind, sharing='none', padded=True) for kind in PROJECTIONS},
    'by head, streamed': dict(projection='dynamic', sharing='none', padded=True, **PREFIX, **STREAMED),
    'headwise, streamed': dict(projection='dynamic', sharing='headwise', local_size=3, **PREFIX, **STREAMED),
    'by layer': dict(projection='separable', sharing='key_value', proj_len=(16, 25), qk_norm=True),
    'table of positions but for the prefix': dict(pos_embed='learn', no_embed_class=True, **PREFIX),
    'positions by axis': dict(pos_embed='separable', patch_size=2, img_size=(20, 16)),
    'taps two apart': dict(local_grid=5, **LOCAL, **PREFIX),
    'a reach over several bands, streamed': dict(local_size=9, **STREAMED),
    'norms over all tokens': dict(token_norm=True, projection='dynamic', **LOCAL),
    'several images a chunk': dict(local_size=3, chunk_size=60),
    'class token': dict(global_pool='token', **PREFIX),
    'mean with prefix': dict(global_pool='avg', pool_include_prefix=True, padded=True, **PREFIX),
    'largest': dict(global_pool='max', fc_norm=False),
    'mean and largest': dict(global_pool='avgmax', **PREFIX),
    'drop path, streamed': dict(drop_path_rate=0.5, **STREAMED),
    'checkpointed and streamed': dict(local_size=3, checkpointed=True, **STREAMED),
    'auto': dict(chunk_size='auto', local_size=3),
    'one process': dict(count=1, **LOCAL, **PREFIX),
}


def create(padded: bool = False, checkpointed: bool = False, count: int = COUNT, **arguments: Any) -> Any:
    """A model with weights that are far from their start, in training mode."""
    torch.manual_seed(0)
    model = timm.create_model('test_linformer_vit', **{**CREATE, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.set_grad_checkpointing(checkpointed)
    return model


def batch(model: Any, padded: bool) -> tuple[Tensor, Tensor | None]:
    """Two images, and of one of them some tokens that are padding."""
    torch.manual_seed(1)
    mask = torch.rand(2, model.patch_embed.num_patches) < 0.4
    mask[0] = False
    mask[1, : mask.shape[1] // 3] = True  # all of the first band
    return torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64), mask if padded else None


def learnt(model: Any, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the images and of all weights."""
    images = images.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(2)
    logits = model(images, key_padding_mask=mask)
    logits.square().sum().backward()
    return logits.detach(), images.grad, {name: p.grad for name, p in model.named_parameters()}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


def compare(case: dict[str, Any], meshes: dict[int, Any]) -> dict[str, float]:
    """How far a band's outputs and gradients are from those of the whole image in one process."""
    model = create(**{**case, 'chunk_size': 0})
    images, mask = batch(model, case.get('padded', False))
    wanted = learnt(model, images, mask)
    with torch.no_grad():
        scored = model.eval()(images, key_padding_mask=mask)
        maps = model.forward_intermediates(images, key_padding_mask=mask, intermediates_only=True)

    model.train().share_images(meshes[case.get('count', COUNT)])
    model.set_chunk_size(case.get('chunk_size', 0))
    band, grid = model.band, model.patch_embed.grid_size
    rows, patch = band.rows(grid[0]), model.patch_embed.patch_size[0]
    pixels = slice(rows.start * patch, rows.stop * patch)
    own = images[:, :, pixels], None if mask is None else band.tokens(mask, grid)
    logits, image_gradient, gradients = learnt(model, *own)
    summed = torch.cat([gradient.flatten() for gradient in gradients.values()])  # as DDP does
    dist.all_reduce(summed, group=band.group)
    mean = dict(zip(gradients, summed.div(band.count).split([g.numel() for g in gradients.values()]), strict=True))
    with torch.no_grad():
        own_scored = copy.deepcopy(model).eval()(own[0], key_padding_mask=own[1])
        own_maps = model.eval().forward_intermediates(own[0], key_padding_mask=own[1], intermediates_only=True)
    return {
        'logits': error(logits, wanted[0]),
        'scored': error(own_scored, scored),
        'maps': max(error(m, w[:, :, rows]) for m, w in zip(own_maps, maps, strict=True)),
        'images': error(image_gradient / band.count, wanted[1][:, :, pixels]),
        **{name: error(mean[name], wanted[2][name].flatten()) for name in mean},
    }


class Sent(TorchDispatchMode):
    """Counts the numbers that collectives are given."""

    def __init__(self) -> None:
        super().__init__()
        self.summed, self.exchanged = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if 'allreduce' in name:
            self.summed += sum(t.numel() for t in args[0])
        elif 'all_to_all_single' in name:
            self.exchanged += args[0].numel()
        return function(*args, **(kwargs or {}))


def count_sent(mesh: Any, depth: int, **arguments: Any) -> tuple[int, int]:
    model = create(depth=depth, pos_embed='none', **arguments)
    model.share_images(mesh)
    rows = model.band.rows(model.patch_embed.grid_size[0])
    images = torch.zeros(2, 3, *model.patch_embed.img_size, dtype=torch.float64)[:, :, rows]
    with Sent() as sent, torch.no_grad():
        model(images)
    return sent.summed, sent.exchanged


def process(rank: int, folder: Path, port: int, cases: dict[str, dict[str, Any]]) -> None:
    """All that needs processes, in one go; what was found is written to a file of each."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://localhost:{port}', rank=rank, world_size=COUNT)
    meshes = {
        n: init_device_mesh('cpu', (COUNT // n, n), mesh_dim_names=('data', 'sequence'))['sequence'] for n in (1, 2, 4)
    }
    found: dict[str, Any] = {name: compare(case, meshes) for name, case in cases.items()}
    for size in ((10, 8), (20, 8)):
        for kind in {case['projection'] for case in cases.values() if 'projection' in case}:
            # of three layers and of one: what two layers send
            a, b = (count_sent(meshes[4], depth, img_size=size, projection=kind, local_size=3) for depth in (3, 1))
            found[f'sent by {kind} at {size}'] = [x - y for x, y in zip(a, b, strict=True)]
    model = create()
    model.share_images(meshes[4])
    for name, call in {
        'whole image': lambda: model(batch(model, False)[0]),
        'two dimensions': lambda: model.share_images(init_device_mesh('cpu', (2, 2))),
    }.items():
        with pytest.raises(ValueError) as raised:
            call()
        found[name] = str(raised.value)
    torch.save(found, folder / f'{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def in_processes(folder: Path, cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    mp.start_processes(process, (folder, free_port(), cases), nprocs=COUNT, start_method='forkserver')
    return [torch.load(folder / f'{rank}.pt') for rank in range(COUNT)]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    return in_processes(tmp_path_factory.mktemp('sequence'), CASES)


@pytest.fixture(scope='module')
def found_slowly(tmp_path_factory):
    return in_processes(tmp_path_factory.mktemp('sequence'), SLOW_CASES)


def check(found: list[dict[str, Any]], case: str) -> None:
    for rank, errors in enumerate(f[case] for f in found):
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-10, (rank, worst, errors[worst])


@pytest.mark.parametrize('case', CASES)
def test_processes_that_share_images_give_the_outputs_and_gradients_of_one(found, case):
    check(found, case)


@pytest.mark.slow
@pytest.mark.parametrize('case', SLOW_CASES)
def test_more_of_them_do(found_slowly, case):
    check(found_slowly, case)


@pytest.mark.parametrize('kind', slow_but(QUICK, PROJECTIONS))
def test_a_layer_sends_its_projected_rows_and_the_rows_that_neighbours_read_whatever_n_is(kind, request):
    found = request.getfixturevalue('found' if kind in QUICK else 'found_slowly')
    B, K, D, width = 2, 16, 16, 8
    numbers = {'dynamic': K * (D + 2), 'max_pool': 3 * K * D}.get(kind, K * D)
    for size in ((10, 8), (20, 8)):
        for rank, (summed, exchanged) in enumerate(f[f'sent by {kind} at {size}'] for f in found):
            neighbours = 1 if rank in (0, COUNT - 1) else 2
            assert summed == 2 * B * numbers
            assert exchanged == 2 * B * neighbours * width * D


def test_a_whole_image_where_a_band_is_wanted_is_an_error_with_both_sizes(found):
    assert all('(B, 3, ' in f['whole image'] and '10, 8]' in f['whole image'] for f in found)
    assert 'one dimension' in found[0]['two dimensions']


@pytest.mark.parametrize(
    'arguments, words',
    [
        (dict(projection='none'), 'full attention'),
        (dict(proj_len=80), 'full attention'),
        (dict(dynamic_img_size=True), 'set_input_size'),
        (dict(global_pool='map'), "'avg'"),
        (dict(proj_drop_rate=0.1), 'proj_drop_rate'),
        (dict(pos_drop_rate=0.1), 'pos_drop_rate'),
        (dict(patch_drop_rate=0.1), 'patch_drop_rate'),
        (dict(img_size=(3, 30)), '3 rows'),
    ],
)
def test_models_that_need_all_tokens_in_one_place_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        check_shared(create(**arguments), COUNT)
    check_shared(create(), COUNT)


def test_bands_are_all_rows_in_order_and_differ_by_one():
    for height, count in ((10, 4), (4, 4), (7, 2), (9, 1)):
        band = Band.__new__(Band)
        band.count = count
        rows = [band.rows(height, rank) for rank in range(count)]
        assert [i for own in rows for i in range(own.start, own.stop)] == list(range(height))
        assert max(r.stop - r.start for r in rows) - min(r.stop - r.start for r in rows) <= 1
