"""What only a GPU shows; all of it takes a minute or two there (`scripts/benchmarks/gpu_report.sh` begins with it)."""

import copy
import warnings

import pytest
import timm
import torch
from runs import image_set, small
from torch._dynamo.utils import counters

import linvision  # noqa: F401  (registers the models)
from linvision.data import Augmentation, create_batches
from linvision.streaming.chunk_size import free_bytes
from linvision.train import train
from linvision.train.data import TrainingData
from linvision.train.evaluate import evaluate
from linvision.train.learner import Learner
from linvision.train.parallel import Processes
from scripts.benchmarks.gpu_meter import Meter

pytestmark = pytest.mark.gpu
CUDA = torch.device('cuda', 0)
KINDS = [
    {},
    {'chunk_size': 64},
    {'projection': 'linear', 'local_size': 0, 'class_token': True},
    {'projection': 'conv'},
    {'projection': 'max_pool', 'chunk_size': 64},
    {'projection': 'none'},
]


def step(model, images):
    """Logits and gradients of a training step, on the CPU."""
    model.zero_grad()
    out = model(images)
    out.float().square().sum().backward()
    return out.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('arguments', KINDS, ids=str)
def test_a_gpu_computes_what_a_cpu_does(monkeypatch, arguments):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=4, **arguments)
    images = torch.randn(3, 1, 16, 16)
    expected = step(model, images)
    torch.testing.assert_close(step(model.to(CUDA), images.to(CUDA)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('task', ['classify', 'masked_pixels'])
@pytest.mark.parametrize('precision', ['bf16', 'fp32'])
def test_a_step_and_evaluation_never_wait_for_the_device(tmp_path, task, precision):
    recipe = small(
        tmp_path / 'run', task=task, mask_size=2, device='cuda', stages=((16, 1.0),), batch_size=16, opt='muon',
        augmentation='torch', hflip=0.5, shift=1, erase=0.5, crop_scale=(0.5, 1.0), compile='off', ema_decay=0.9,
    )  # fmt: skip
    data = TrainingData(recipe, Processes(CUDA))
    learner = Learner(recipe, data.shape, 16, 16, 10, data.mean, data.std, data.processes)
    learner.start(precision)
    learner.task.train()
    batches = data.stream(0, 16)
    for i in range(3):
        if i:
            torch.cuda.set_sync_debug_mode('error')
        try:
            learner.update(*next(batches), 0.5, i)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert 0 <= evaluate(learner.model, data.test, 16)['top1'] <= 1 if task == 'classify' else True


def test_images_are_changed_as_on_a_cpu():
    augmentation = Augmentation('torch', crop_scale=(0.5, 1.0), shift=2, hflip=0.5, color_jitter=0.3, erase=0.5)
    found = []
    for device in (torch.device('cpu'), CUDA):
        batches = create_batches(image_set(in_chans=3), 8, (0.5,) * 3, (0.25,) * 3, device, augmentation)
        found.append(next(batches.stream(1, 0, 8))[0].cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('tokens', [256, 4096])
def test_attention_runs_fused(tokens):
    side = int(tokens**0.5)
    model = timm.create_model('linformer_vit_tiny_patch1_32', img_size=side).to(CUDA)
    images = torch.randn(2, 3, side, side, device=CUDA)

    def run():
        with torch.autocast('cuda', torch.bfloat16):
            model(images).sum().backward()

    found = Meter(CUDA, float('inf')).kernels(run)
    assert not any('math' in name for name in found['attention_ran']), found
    assert any(w in name for name in found['attention_ran'] for w in ('flash', 'cudnn', 'efficient')), found


@pytest.mark.parametrize('chunk_size', [0, 512])
def test_compiled_blocks_compute_what_plain_ones_do(chunk_size):
    torch._dynamo.reset()
    counters.clear()
    plain = timm.create_model('test_linformer_vit', img_size=32, chunk_size=chunk_size).to(CUDA)
    compiled = copy.deepcopy(plain)
    compiled.set_compile('inductor')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # inductor's own, of its settings
        for batch in (4, 3):
            images = torch.randn(batch, 3, 32, 32, device=CUDA)
            torch.testing.assert_close(step(compiled, images), step(plain, images), rtol=1e-2, atol=1e-3)
    assert counters['stats']['unique_graphs'] <= 2 and not counters['graph_break']


def test_a_training_step_as_a_cuda_graph_computes_what_a_plain_one_does():
    plain = timm.create_model('test_linformer_vit', chunk_size=0).to(CUDA)
    graphed = copy.deepcopy(plain)
    images = torch.randn(4, 3, 16, 16, device=CUDA)
    graphed = torch.cuda.make_graphed_callables(graphed, (torch.zeros_like(images),))
    for _ in range(2):
        torch.testing.assert_close(step(graphed, images), step(plain, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'changes', [{}, {'precision': 'fp32', 'compile': 'off', 'chunk_size': 64}], ids=['auto', 'fp32']
)
def test_a_run_learns_there(tmp_path, capsys, changes):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        metrics = train(
            small(tmp_path / 'run', **{'device': 'cuda', 'precision': 'auto', 'epochs': 6, 'lr': 3e-3, 'opt': 'muon',
                                       'augmentation': 'torch', 'hflip': 0.5, **changes})
        )  # fmt: skip
    said = capsys.readouterr().out
    assert metrics['top1'] > 0.9 and metrics['peak_memory_gib'] > 0
    assert ('TF32' in said) == (metrics['precision'] == 'fp32') and ('compiled blocks' in said) == (not changes)


def test_memory_and_energy_are_measured():
    meter = Meter(CUDA, float('inf'), least_s=0.01, energy_s=0.2)
    x = torch.randn(4096, 4096, device=CUDA)
    found = meter.measured(lambda: x @ x, 2)
    assert all(once['peak_gib'] >= 4096**2 * 4 / 2**30 for once in found['steps'])
    energy = meter.energy(lambda: x @ x)
    assert energy.get('joules', 1) > 0 or 'no_energy' in energy
    assert 0 < free_bytes(CUDA) <= torch.cuda.get_device_properties(CUDA).total_memory
