"""Where a step's time goes: the operators of one of the benchmark's cases, and their shares.

    python -m scripts.benchmarks.profile_step --model linvision --tokens 16384 --precision bf16

Prints a Markdown table. The multiply-adds of the model over a large square product's rate are its lower bound.
"""

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from linvision.guard import guarded
from linvision.nearest import nearest
from scripts.benchmarks.contenders import CONTENDERS, DTYPES, Case, create_step, multiply_adds
from scripts.benchmarks.speed import product_gflops

NAMES = {
    'mkldnn::_linear_pointwise': 'matrix products with bias, GELU or residual, fused by oneDNN',
    'aten::addmm': 'matrix products with a bias',
    'aten::mm': 'matrix products',
    'aten::bmm': 'batched matrix products',
    'aten::_softmax': 'softmax',
    'aten::copy_': 'copies',
    'aten::native_layer_norm': 'layer norm',
    'aten::mkldnn_convolution': 'convolutions',
}


def main(
    model: str = 'linvision',
    tokens: int = 16384,
    training: bool = False,
    precision: str = 'bf16',
    threads: int = 0,
    rows: int = 12,
) -> None:
    """Profile one step on the CPU, after two that do not count.

    Args:
        model: One of the benchmark's.
        tokens: N, a square number.
        training: Forward and backward, instead of forward.
        precision: 'fp32' or 'bf16'.
        threads: CPU threads (0: torch's choice).
        rows: Operators to list; the rest is summed up.
    """
    if model not in CONTENDERS:
        raise ValueError(nearest('model', model, CONTENDERS))
    if precision not in DTYPES:
        raise ValueError(nearest('precision', precision, DTYPES))
    torch.set_num_threads(threads or torch.get_num_threads())
    case = Case(model, tokens, training, precision)
    step, _ = create_step(case, torch.device('cpu'))
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    bound_ms = 2e-6 * multiply_adds(case) * (3 if training else 1)  # millions of operations …
    bound_ms /= product_gflops(4096, 4096, 4096, DTYPES[precision], torch.get_num_threads())  # … over 10⁹ a second
    mode = 'a training step' if training else 'inference'
    print(f'{model}, {tokens:,} tokens, {mode}, {precision}, {torch.get_num_threads()} threads: {total / 1000:.0f} ms;')
    print(f'its multiply-adds at the rate of a 4,096³ product: {bound_ms:.0f} ms.\n')
    print('| operator | calls | ms | share |\n| --- | --- | --- | --- |')
    for event in events[:rows]:
        name = NAMES.get(event.key, '')
        ms = event.self_cpu_time_total / 1000
        share = 100 * event.self_cpu_time_total / total
        print(f'| `{event.key}`{name and " (" + name + ")"} | {event.count:,} | {ms:.0f} | {share:.0f} % |')
    rest = sum(e.self_cpu_time_total for e in events[rows:])
    print(f'| all else | | {rest / 1000:.0f} | {100 * rest / total:.0f} % |')


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
