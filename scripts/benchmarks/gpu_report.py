"""Time, memory and energy of linvision on a GPU, beside what people use today. One command of less than nine minutes:

    python -m scripts.benchmarks.gpu_report --output outputs/gpu     # writes outputs/gpu.json, .md and .png

Models from image to logits, as in `speed.py`, in one process: steps of all models of one size in turn, medians,
memory as the allocator counts it above the model and its input. Then attention alone, forward and backward (B16 H8 d64
fp16, as in FlashAttention's tables 20 and 21, arXiv 2205.14135), the largest batch that fits at the largest size,
training images a second there, and joules an image where NVML counts them. `--device cpu` runs it anywhere.
`linformer-pytorch` comes with `pip install 'linvision[bench]'`.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from linvision.extras import MissingPackage
from linvision.guard import end, guarded
from scripts.benchmarks.contenders import Case, create_step, multiply_adds
from scripts.benchmarks.speed import machine
from scripts.benchmarks.tables import summarise, write

MODELS = ('linvision', 'linvision, whole', 'linvision, compiled', 'linvision, linear E', 'linvision, K = 128',
          'ViT, fused', 'ViT, written out', 'linformer-pytorch')  # fmt: skip
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Meter:
    """Seconds and peak memory of a function on a device.

    Args:
        device: The device.
        deadline: When no further measurement starts, on the clock of `time.monotonic`.
    """

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device, self.deadline, self.cuda = device, deadline, device.type == 'cuda'

    def once(self, function: Callable[[], Any]) -> dict[str, float]:
        """One call."""
        base = 0
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            base = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        function()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) - base if self.cuda else 0
        return {'seconds': seconds, 'peak_gib': peak / 2**30}

    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.deadline


def why(error: BaseException) -> str:
    """A reason of a few words."""
    if isinstance(error, OUT_OF_MEMORY):
        return 'out of memory'
    return (str(error) or type(error).__name__).splitlines()[0][:80]


def interleave(meter: Meter, steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Call functions in turn: {'steps': […], 'first_s': …} for each, or {'steps': [], 'why_not': …}."""
    found: dict[str, dict[str, Any]] = {name: {'steps': []} for name in steps}
    for i in range(-1, repeats):
        for name, step in steps.items():
            row = found[name]
            if 'why_not' in row or (i > 0 and meter.late()):
                continue
            try:
                once = meter.once(step)
            except (RuntimeError, MemoryError) as error:
                row.update(steps=[], why_not=why(error))
                torch.cuda.empty_cache()
                continue
            if i < 0:
                row['first_s'] = once['seconds']  # with compilation
            else:
                row['steps'].append(once)
    for row in found.values():
        summarise(row)
    return found


def whole_models(meter: Meter, sizes: tuple[int, ...], names: tuple[str, ...], repeats: int) -> list[dict[str, Any]]:
    """Inference and training steps of whole models, one image: rows as `speed.py` has them."""
    rows = []
    for cases in [[Case(m, n, training, 'bf16') for m in names] for n in sizes for training in (False, True)]:
        steps: dict[str, Callable[[], Any]] = {}
        failed = {}
        for case in cases:
            try:
                if meter.late():
                    raise RuntimeError('no time was left')
                steps[case.model], _ = create_step(case, meter.device)
            except MissingPackage as error:
                failed[case.model] = {'steps': [], 'why_not': str(error)}
            except (RuntimeError, MemoryError) as error:
                failed[case.model] = {'steps': [], 'why_not': why(error)}
        found = {**interleave(meter, steps, repeats), **failed}
        for case in cases:
            work = {'multiply_adds': multiply_adds(case) * (3 if case.training else 1)} if case.model in steps else {}
            rows.append({**dataclasses.asdict(case), **work, **found[case.model]})
        steps.clear()
    return rows


def attention_alone(meter: Meter, sizes: tuple[int, ...], batch: int, repeats: int) -> list[dict[str, Any]]:
    """Attention forward and backward, B16 H8 d64 K256: over all tokens, and over rows that one E projects."""
    H, d, K = 8, 64, 256
    dtype = torch.float16 if meter.cuda else torch.float32
    rows = []
    for N in sizes:
        query, key, value = (
            torch.randn(batch, H, N, d, device=meter.device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        E = (torch.randn(K, N, device=meter.device) / N**0.5).to(dtype).requires_grad_()

        def linformer(q: Tensor = query, k: Tensor = key, v: Tensor = value, E: Tensor = E) -> None:
            F.scaled_dot_product_attention(q, E @ k, E @ v).sum().backward()

        def full(q: Tensor = query, k: Tensor = key, v: Tensor = value) -> None:
            F.scaled_dot_product_attention(q, k, v).sum().backward()

        steps = {} if meter.late() else {'linformer': linformer, 'scaled_dot_product_attention': full}
        for name, row in interleave(meter, steps, repeats).items():
            rows.append({'attention': name, 'tokens': N, 'batch_size': batch, **row})
    return rows


def largest_batch(meter: Meter, tokens: int, limit: int) -> dict[str, Any]:
    """The largest power of two of images whose training step fits, and its images a second and joules an image."""
    found: dict[str, Any] = {'tokens': tokens, 'batch_size': 0}
    batch = 1
    while batch <= limit and not meter.late():
        try:
            step, _ = create_step(Case('linvision', tokens, True, 'bf16', batch), meter.device)
            meter.once(step)
            before = energy_j(meter.device)
            once = meter.once(step)
            after = energy_j(meter.device)
        except (RuntimeError, MemoryError) as error:
            found['stopped_by'] = why(error)
            break
        found.update(batch_size=batch, images_per_s=batch / once['seconds'], peak_gib=once['peak_gib'])
        found['joules_per_image'] = (after - before) / batch if before is not None and after is not None else None
        batch *= 2
    return found


def energy_j(device: torch.device) -> float | None:
    """Joules that the GPU has used since its driver was loaded; None where NVML does not say."""
    if device.type != 'cuda':
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # not installed, not permitted, not supported: no figure
        return None


def main(
    output: Path = Path('outputs/gpu_report'),
    device: str = 'cuda',
    tokens: tuple[int, ...] = (1024, 4096, 16384, 65536),
    models: tuple[str, ...] = MODELS,
    attention_batch: int = 16,
    batch_limit: int = 1024,
    repeats: int = 10,
    max_minutes: float = 8.5,
) -> None:
    """Measure, and write JSON, Markdown and a picture.

    Args:
        output: Where the files go: OUTPUT.json, .md and .png.
        device: Torch device.
        tokens: Sizes, square numbers.
        models: What to measure.
        attention_batch: Images in the measurement of attention alone.
        batch_limit: Largest batch to try.
        repeats: Steps of each case, after a warm-up.
        max_minutes: A bound on the whole; what no time is left for is reported so.
    """
    where = torch.device(device)
    if where.type == 'cuda' and not torch.cuda.is_available():
        end('there is no CUDA device here; --device cpu runs the report on the CPU.')
    unknown = [m for m in models if m not in MODELS]
    if unknown:
        end(f'unknown models {unknown}; known: {", ".join(MODELS)}.')
    start = time.monotonic()
    about = machine(torch.get_num_threads())
    about['device'] = torch.cuda.get_device_name(where) if where.type == 'cuda' else about['cpu']
    command = shlex.join(['python', '-m', 'scripts.benchmarks.gpu_report', *sys.argv[1:]])
    found: dict[str, Any] = {'machine': about, 'command': command, 'roofline': {}}
    share = 60 * max_minutes
    found['rows'] = whole_models(Meter(where, start + 0.6 * share), tokens, models, repeats)
    found['attention'] = attention_alone(Meter(where, start + 0.8 * share), tokens, attention_batch, repeats)
    found['largest_batch'] = largest_batch(Meter(where, start + 0.95 * share), tokens[-1], batch_limit)
    found['seconds'] = time.monotonic() - start
    output.parent.mkdir(parents=True, exist_ok=True)
    write(found, output)


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
