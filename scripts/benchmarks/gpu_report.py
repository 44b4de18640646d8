"""The parts of `gpu_report.sh`: time, memory, energy and kernels of linvision on a GPU, and what it learns in minutes.

    python -m scripts.benchmarks.gpu_report speed --output outputs/gpu --seconds 150

Each figure is a line of OUTPUT/figures.jsonl as soon as it is there; `tables` makes OUTPUT/figures.md of them. All
models see `TOKENS` tokens a step, whatever the length of a sequence: bf16, training under autocast, inference in bf16.
`--device cpu --tiny` rehearses it anywhere. It needs no package beside torch, torchvision, timm and what these bring.
"""

import argparse
import dataclasses
import gc
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from linvision.guard import guarded
from linvision.models.attention import LinformerAttention, attention
from linvision.models.projection_kinds import PROJECTIONS
from scripts.benchmarks.contenders import GRAPHED, Case, create_step, predicted_gib
from scripts.benchmarks.gpu_meter import Meter
from scripts.benchmarks.machine import machine
from scripts.benchmarks.tables import markdown, summarise

EAGER = ('linvision', 'ViT, fused', 'linvision, K = 128', 'ViT, written out')
FEW = 4096  # tokens: up to here launches decide (docs/gpu_count.md)
PART_MIB = 12  # a finished run's archive is cut into files of this size


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured, and in rehearsal."""

    step: int = 2**19  # tokens a step
    tokens: tuple[int, ...] = (65536, 16384, 4096, 1024)
    long: tuple[int, ...] = (2**20, 2**22)
    attention: tuple[int, ...] = (65536, 16384, 4096)
    attention_batch: int = 16
    repeats: int = 5
    least_s: float = 0.2
    energy_s: float = 3.0
    precision: str = 'bf16'


TINY = Sizes(512, (256, 64), (1024,), (1024,), 1, 1, 0.0, 0.01, 'fp32')  # bf16 is slow where it is emulated


class Report:
    """Where figures go, as soon as they are there.

    Args:
        folder: The output folder.
        device: What is measured.
        sizes: How large.
        seconds: How long, at most.
    """

    def __init__(self, folder: Path, device: torch.device, sizes: Sizes, seconds: float) -> None:
        self.folder, self.device, self.sizes = folder, device, sizes
        self.start, self.seconds = time.monotonic(), seconds
        folder.mkdir(parents=True, exist_ok=True)

    def meter(self, share: float) -> Meter:
        """A meter up to this share of the time."""
        return Meter(self.device, self.start + share * self.seconds, self.sizes.least_s, self.sizes.energy_s)

    def add(self, part: str, **figure: Any) -> None:
        """A line of JSON, on the disk at once."""
        line = json.dumps({'part': part, **figure, 'at_s': round(time.monotonic() - self.start, 1)})
        with (self.folder / 'figures.jsonl').open('a') as file:
            file.write(line + '\n')
            file.flush()
            os.fsync(file.fileno())
        print(line if len(line) < 300 else line[:300] + ' …', flush=True)

    def row(self, part: str, case: Case, measure: Callable[[Callable[[], Any]], dict[str, Any]], late: bool) -> None:
        """The figures of a case, or why there are none."""
        row: dict[str, Any] = {'steps': []}
        limit = 0.8 * free_gib(self.device)
        try:
            if late:
                raise TimeoutError('no time was left')
            if predicted_gib(case) > limit:
                raise MemoryError(f'needs at least {predicted_gib(case):.0f} GiB of {limit:.0f}')
            step, row['parameters'] = create_step(case, self.device)
            row.update(measure(step))
        except torch.OutOfMemoryError:
            row['why_not'] = 'out of memory'
        except Exception as error:  # whatever it is, the next case is measured
            row['why_not'] = (str(error) or type(error).__name__).splitlines()[0][:200]
        summarise(row)
        self.add(part, **dataclasses.asdict(case), **row)
        step = None
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()

    def cases(self, names: tuple[str, ...]) -> list[Case]:
        """The longest sequences first, training before inference; attention written out in batches that fit."""
        found = []
        for tokens in self.sizes.tokens:
            for training in (True, False):
                for name in names:
                    case = Case(name, tokens, training, self.sizes.precision, max(1, self.sizes.step // tokens))
                    while name == 'ViT, written out' and case.batch_size > 1 and too_large(case, self.device):
                        case = dataclasses.replace(case, batch_size=case.batch_size // 2)
                    found.append(case)
        return found


def free_gib(device: torch.device) -> float:
    """Memory that is free there; of a CPU, whose machine a rehearsal shares, 4."""
    return torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == 'cuda' else 4.0


def too_large(case: Case, device: torch.device) -> bool:
    """Whether a case is predicted not to fit."""
    return predicted_gib(case) > 0.8 * free_gib(device)


def speed(report: Report) -> None:
    """Steps of equally many tokens; attention alone; a million tokens and more; then kernels and energy."""
    report.add('machine', **about(report.device))
    meter = report.meter(0.55)
    for case in report.cases(EAGER):
        report.row('speed', case, lambda step: meter.measured(step, report.sizes.repeats), meter.late())
    attention_alone(report, report.meter(0.62))
    meter = report.meter(0.7)
    for tokens in report.sizes.long:
        case = Case('linvision', tokens, False, report.sizes.precision)
        report.row('long', case, lambda step: meter.measured(step, 2), meter.late())
    meter = report.meter(1.0)
    for case in report.cases(EAGER[:2]):
        report.row('detail', case, lambda step: {**meter.kernels(step), **meter.energy(step)}, meter.late())


def compiled(report: Report) -> None:
    """Steps with compiled blocks, each size compiled for itself; training first, of the longest and the shortest.

    Where tokens are few, a training step as a CUDA graph stands beside it: what a step takes without its launches.
    """
    meter, shortest = report.meter(0.8), min(report.sizes.tokens)
    cases = report.cases(('linvision, compiled',))
    cases += [c for c in report.cases((GRAPHED,)) if c.training and c.tokens <= FEW]
    for case in sorted(cases, key=lambda c: (not c.training, c.tokens not in (cases[0].tokens, shortest))):
        torch._dynamo.reset()  # else the second size would open the sizes of the graph
        report.row('speed', case, lambda step: meter.measured(step, report.sizes.repeats), meter.late())


def attention_alone(report: Report, meter: Meter) -> None:
    """Forward and backward, H8 d64 K256 in bf16: our module, our function over one E, and over all tokens.

    As FlashAttention's tables 20 and 21 (arXiv 2205.14135) have it, whose input are queries, keys and values: that is
    'function'. 'module' has the products with its weights besides.
    """
    H, d, rows, B = 8, 64, (16, 16), report.sizes.attention_batch
    kind, bf16 = PROJECTIONS['separable'], {'device': report.device, 'dtype': torch.bfloat16}
    for N in report.sizes.attention:
        side = int(N**0.5)

        def module(N: int = N, side: int = side) -> Callable[[], None]:
            net = LinformerAttention(H * d, H, rows=rows, projection='separable', **bf16)
            x = torch.randn(B, N, H * d, **bf16, requires_grad=True)
            shapes = kind.shapes((side, side), rows, H * d)
            factors = [(torch.randn(s, **bf16) / s[-1] ** 0.5).requires_grad_() for s in shapes]
            sums = torch.ones(rows[0] * rows[1], **bf16)
            return lambda: backward(net(x, [*factors, sums], (side, side)), [x, *factors, *net.parameters()])

        def function(N: int = N) -> Callable[[], None]:
            qkv = [torch.randn(B, H, N, d, **bf16, requires_grad=True) for _ in range(3)]
            E = (torch.randn(rows[0] * rows[1], N, **bf16) / N**0.5).requires_grad_()
            return lambda: backward(attention(qkv[0], E @ qkv[1], E @ qkv[2], None, 0.0), [*qkv, E])

        def full(N: int = N) -> Callable[[], None]:
            qkv = [torch.randn(B, H, N, d, **bf16, requires_grad=True) for _ in range(3)]
            return lambda: backward(F.scaled_dot_product_attention(*qkv), qkv)

        for name, make in (('module', module), ('function', function), ('scaled_dot_product_attention', full)):
            row: dict[str, Any] = {'steps': []}
            try:
                if not meter.late():
                    step = make()
                    row.update(meter.measured(step, report.sizes.repeats), **meter.kernels(step))
            except Exception as error:
                row['why_not'] = (str(error) or type(error).__name__).splitlines()[0][:200]
            summarise(row)
            report.add('attention', attention=name, tokens=N, batch_size=B, **row)


def backward(out: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """The backward pass of a sum, after gradients were set to None."""
    for tensor in inputs:
        tensor.grad = None
    out.backward(torch.ones_like(out))


def learn(report: Report, packed: Path, minutes: float) -> None:
    """CIFAR-10 by the pixel from a set on the device: tiny, then pico, each for some minutes of training at most."""
    from linvision.data import datasets
    from linvision.train import train
    from recipes.cifar10_pixels import RECIPE
    from scripts.tools.pack_images import open_packed

    sets: dict[str, Any] = {}

    def load(root: Path, split: str, download: bool) -> Any:
        if split not in sets:
            sets[split] = open_packed(packed, split)
        return sets[split]

    datasets.DATASETS['packed'] = load
    tiny = report.sizes is TINY
    for i, name in enumerate(('tiny', 'pico')):
        left = report.seconds - (time.monotonic() - report.start)
        time_s = min(60 * minutes, left / (2 - i) - (0 if tiny else 25))  # the rest: start, compilation, scores
        if time_s < (0 if tiny else 15):
            report.add('learn', model=name, why_not='no time was left')
            continue
        with tempfile.TemporaryDirectory() as folder:
            recipe = RECIPE.replace(
                model='test_linformer_vit' if tiny else f'linformer_vit_{name}_patch1_32', dataset='packed',
                output_dir=Path(folder) / f'cifar10_{name}', max_minutes=max(time_s, 1) / 60, augmentation='torch',
                stages=((8, 0.6), (16, 0.4)) if tiny else ((16, 0.6), (32, 0.4)), shift=2, erase=0.0, cutmix=0.0,
                val_fraction=0.02, eval_every=4, batch_size=32 if tiny else 256, eval_batch_size=500,
                device=str(report.device), compile=compile_pays(report.folder), checkpoint_every=10**9,
            )  # fmt: skip
            try:
                metrics = train(recipe)
            except Exception as error:
                report.add('learn', model=name, why_not=(str(error) or type(error).__name__).splitlines()[0][:300])
                continue
            told = ('top1', 'loss', 'num_samples', 'data_note', 'train_minutes', 'epochs', 'steps', 'images_per_s',
                    'tokens_per_s', 'peak_memory_gib', 'num_parameters', 'precision')  # fmt: skip
            report.add('learn', model=name, compile=recipe.run.compile, **{k: metrics.get(k) for k in told})
            archive(recipe.run.output_dir, report.folder)


def compile_pays(folder: Path) -> str:
    """'on' where the shortest sequences train faster compiled than not, as was measured; else 'off'."""
    rows = [r for r in figures(folder) if r['part'] == 'speed' and r['training'] and r['steps']]
    pairs = {(r['model'], r['tokens']): r['seconds'] for r in rows}
    least = min((n for _, n in pairs), default=0)
    eager, blocks = (pairs.get((model, least), 0.0) for model in ('linvision', 'linvision, compiled'))
    return 'on' if 0 < blocks < eager else 'off'


def archive(run: Path, folder: Path) -> None:
    """A run's metrics, model and curves as NAME.tar.gz, cut into files NAME.tar.gz.0, … that `cat` joins."""
    packed = run.with_suffix('.tar.gz')
    with tarfile.open(packed, 'w:gz') as tar:
        for part in ('metrics.json', 'model', 'tensorboard'):
            tar.add(run / part, f'{run.name}/{part}')
    data, size = packed.read_bytes(), PART_MIB * 2**20
    for i in range(0, len(data), size):
        (folder / f'{packed.name}.{i // size}').write_bytes(data[i : i + size])


def about(device: torch.device) -> dict[str, Any]:
    """The device and the versions."""
    found = machine(torch.get_num_threads())
    found['device'] = found['cpu']
    if device.type == 'cuda':
        facts = torch.cuda.get_device_properties(device)
        found |= {'device': facts.name, 'gpu_gib': round(facts.total_memory / 2**30, 1), 'cuda': torch.version.cuda}
        found |= {'cudnn': torch.backends.cudnn.version(), 'capability': f'{facts.major}.{facts.minor}'}
    return found


def figures(folder: Path) -> list[dict[str, Any]]:
    """All lines that there are."""
    path = folder / 'figures.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(report: Report) -> None:
    """OUTPUT/figures.md."""
    lines = figures(report.folder)
    by_part = {part: [row for row in lines if row['part'] == part] for part in ('speed', 'long', 'attention', 'detail')}
    found = {
        'machine': next((row for row in lines if row['part'] == 'machine'), about(report.device)),
        'command': 'bash scripts/benchmarks/gpu_report.sh', 'roofline': {}, 'rows': by_part['speed'],
        **{part: by_part[part] for part in ('long', 'attention', 'detail')},
        'learn': [row for row in lines if row['part'] == 'learn'],
    }  # fmt: skip
    (report.folder / 'figures.md').write_text(markdown(found))


PARTS: dict[str, Callable[..., None]] = {'speed': speed, 'compiled': compiled, 'learn': learn, 'tables': tables}


def main(arguments: list[str] | None = None) -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=PARTS)
    parser.add_argument('--output', type=Path, default=Path('outputs/gpu'), help='folder for all that is found')
    parser.add_argument('--device', default='cuda', help='torch device')
    parser.add_argument('--seconds', type=float, default=120, help='no measurement starts later')
    parser.add_argument('--tiny', action='store_true', help='rehearse at sizes for a CPU')
    parser.add_argument('--packed', type=Path, help='for learn: the file of scripts.tools.pack_images')
    parser.add_argument('--minutes', type=float, default=3, help='for learn: of training, for each model at most')
    told = parser.parse_args(arguments)
    device = torch.device(told.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError('There is no CUDA device here; --device cpu --tiny rehearses the report on the CPU.')
    report = Report(told.output, device, TINY if told.tiny else Sizes(), told.seconds)
    further = {'packed': told.packed, 'minutes': told.minutes} if told.part == 'learn' else {}
    PARTS[told.part](report, **further)


if __name__ == '__main__':
    with guarded():
        main()
