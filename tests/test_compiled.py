"""Compiled blocks: equal to plain ones, in as many graphs as is said, whatever the batch, the chunk and the block."""

import copy

import pytest
import timm
import torch
from torch._dynamo.utils import counters

import linvision  # noqa: F401  (registers the models)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is compiled before a test, nor after it."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def models(backend: str = 'eager', depth: int = 3, **arguments):
    """A compiled model and a plain one of the same weights, of so many blocks."""
    plain = timm.create_model('test_linformer_vit', depth=depth, in_chans=1, num_classes=4, **arguments)
    compiled = copy.deepcopy(plain)
    compiled.set_compile(backend)
    return compiled, plain


def step(model, images):
    """Logits and gradients of a training step."""
    model.zero_grad()
    out = model(images)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def graphs() -> int:
    """Graphs so far, none of them broken."""
    assert not counters['graph_break'], counters['graph_break']
    return counters['stats']['unique_graphs']


ARGUMENTS = [
    {'chunk_size': 0},
    {'chunk_size': 80},  # images of 256 tokens in chunks of 5 rows, and a remainder of one
    {'chunk_size': 80, 'local_size': 0, 'projection': 'linear', 'class_token': True},
    {'chunk_size': 80, 'projection': 'max_pool', 'sharing': 'key_value'},
    {'chunk_size': 600},  # two images at a time
]


@pytest.mark.slow
@pytest.mark.parametrize('arguments', ARGUMENTS, ids=str)
def test_the_same_graphs_serve_all_blocks_batches_and_chunks(arguments):
    compiled, plain = models(**arguments)
    for batch in (4, 2, 6):
        images = torch.randn(batch, 1, 16, 16)
        torch.testing.assert_close(step(compiled, images), step(plain, images), rtol=1e-4, atol=1e-5)
    # of a chunk: without gradients, and recomputed with them; the first one of a tensor, at whose start it lies, may
    # have its own, since dynamo takes a storage offset of zero for another kind of number
    assert graphs() == 1 or arguments['chunk_size'] and 2 <= graphs() <= 4


@pytest.mark.slow
@pytest.mark.parametrize('chunk_size', [0, 80])
def test_drop_path_and_autocast_compile(chunk_size):
    compiled, plain = models('aot_eager', chunk_size=chunk_size, drop_path_rate=0.2)
    images, found = torch.randn(4, 1, 16, 16), []
    for model in (compiled, plain):
        torch.manual_seed(3)
        with torch.autocast('cpu', torch.bfloat16):
            found.append(step(model, images))
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
    assert graphs() == 2 or chunk_size and 4 <= graphs() <= 8  # the first block has no drop path


def test_blocks_run_plain_where_something_looks_into_them():
    compiled, plain = models(depth=2, chunk_size=0)
    compiled.eval(), plain.eval()
    images, seen = torch.randn(2, 1, 16, 16), []
    handles = [block.attn.register_forward_hook(lambda *_: seen.append(1)) for block in compiled.blocks]
    torch.testing.assert_close(compiled(images), plain(images))
    assert len(seen) == 2 and graphs() == 0
    for handle in handles:
        handle.remove()
    one = torch.func.functional_call(compiled, dict(compiled.named_parameters()), (images,))
    torch.testing.assert_close(one, plain(images), rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_compiled_model_has_its_own_weights():
    """As the moving average of a run is one."""
    compiled, plain = models(depth=1, chunk_size=0)
    other = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(compiled.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
    assert (other.eval()(images) == 0).all()
