"""Time and memory of linvision beside what people use today, on the CPU; see `gpu_report.py` for a GPU.

    python -m scripts.benchmarks.speed                  # at most an hour; writes outputs/benchmark.{json,md,png}
    python -m scripts.benchmarks.speed --quick          # a few minutes, up to 4,096 tokens

The packages `linformer` and `linformer-pytorch` come with `pip install 'linvision[bench]'`.

Each case is a process of its own, so that its peak of memory is its own; the processes of one size wait for each other
and step in turn, so that all meet the same load (a step below a second is taken twice, and the second one counts).
Times are medians. Memory is the peak of the resident set during a step, above what the process held with the model and
its input made. What cannot fit into memory, or into the time that is left, is predicted, reported as such, and not
started.
"""

import dataclasses
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.utils.benchmark import Timer
from tqdm import tqdm

from linvision.extras import MissingPackage
from linvision.guard import guarded
from linvision.streaming import cpu_kernels
from scripts import ROOT
from scripts.benchmarks.contenders import (
    CONTENDERS,
    DTYPES,
    PROJ_LEN,
    SIZE,
    Case,
    create_step,
    multiply_adds,
    predicted_gib,
)
from scripts.benchmarks.machine import machine
from scripts.benchmarks.tables import summarise, write

KEY = tuple(field.name for field in dataclasses.fields(Case))
LONGEST = {'linvision': 2**20}  # beyond the others' sizes
SLOW_S = 20  # a step that is predicted to take longer is taken once, without a warm-up


# ---------------------------------------------------------------------------------------------- inside a case's process


def memory_gib(field: str) -> float:
    """A field of this process's memory in /proc: 'VmRSS' now, or 'VmHWM', the peak."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 2**20
    raise OSError(f'/proc/self/status has no {field}: the benchmark needs Linux.')


def work(case: Case, threads: int) -> None:
    """Make a case's model, say so, then take a step for each line that comes in. One line of JSON goes out for each."""
    torch.set_num_threads(threads)
    limit = int(0.9 * available_gib() * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # an error here, not the end of another process
    step, parameters = create_step(case, torch.device('cpu'))
    a = torch.randn(64, 64, dtype=DTYPES[case.precision])
    torch.nn.functional.gelu(a @ a)  # loads the libraries
    base = memory_gib('VmRSS')
    print(json.dumps({'parameters': parameters}), flush=True)
    seconds = float('inf')
    for _ in sys.stdin:
        if seconds < 1:  # another process has had the cores and their caches: a step that does not count
            step()
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts afresh
        start = time.perf_counter()
        loss = float(step().float().sum())
        seconds = time.perf_counter() - start
        if loss != loss:
            raise FloatingPointError(f'{case} gives NaN.')
        print(json.dumps({'seconds': seconds, 'peak_gib': memory_gib('VmHWM') - base}), flush=True)


def reason(errors: list[str], code: int) -> str:
    """Why a case's process ended, in a few words."""
    last = errors[-1] if errors else f'the process ended with code {code}'
    return 'out of memory' if "can't allocate memory" in last or 'MemoryError' in last else last[:100]


class Worker:
    """A case's process."""

    def __init__(self, case: Case, threads: int) -> None:
        command = [
            sys.executable,
            '-m',
            'scripts.benchmarks.speed',
            '--worker',
            json.dumps(dataclasses.asdict(case)),
            '--threads',
            str(threads),
        ]
        environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.parameters = self._read()['parameters']

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            code, errors = self.process.wait(), self.process.stderr.read().strip().splitlines()
            raise RuntimeError(reason(errors, code))
        return json.loads(line)

    def step(self) -> dict[str, float]:
        """Take one step: its seconds and its peak of memory."""
        try:
            self.process.stdin.write('step\n')
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading says why
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


# ---------------------------------------------------------------------------------------------- the machine's own rate


def product_gflops(m: int, k: int, n: int, dtype: torch.dtype, threads: int) -> float:
    """Billions of floating-point operations a second of one matrix product, (m, k) @ (k, n) as a linear layer's, in the
    faster of PyTorch's and oneDNN's operators."""
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    products = [torch.nn.functional.linear]
    if cpu_kernels.supports(dtype):
        products.append(lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, 'none', [], ''))
    timers = [
        Timer('product(x, weight)', globals={'product': p, 'x': x, 'weight': weight}, num_threads=threads)
        for p in products
    ]
    return 2e-9 * m * k * n / min(timer.blocked_autorange(min_run_time=1.0).median for timer in timers)


def roofline(precision: str, threads: int, chunk: int) -> dict[str, float]:
    """The rate of a large square product, and the one that the products of a block reach alone, in GFLOP/s.

    Args:
        precision: 'fp32' or 'bf16'.
        threads: CPU threads.
        chunk: Tokens that a block handles at a time.
    """
    dtype, D, heads = DTYPES[precision], SIZE['embed_dim'], SIZE['num_heads']
    d = D // heads
    shapes = [  # (m, k, n, how many)
        (chunk, D, D, 2),  # query and output
        (chunk, d, PROJ_LEN, heads),  # scores
        (chunk, PROJ_LEN, d, heads),  # context
        (chunk, D, 4 * D, 1),
        (chunk, 4 * D, D, 1),  # the MLP
    ]
    work = [2e-9 * m * k * n * count for m, k, n, count in shapes]
    seconds = [w / product_gflops(m, k, n, dtype, threads) for w, (m, k, n, _) in zip(work, shapes, strict=True)]
    return {
        'square_gflops': product_gflops(4096, 4096, 4096, dtype, threads),
        'shapes_gflops': sum(work) / sum(seconds),
    }


def available_gib() -> float:
    """Memory that a new process can have."""
    lines = Path('/proc/meminfo').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('MemAvailable')) / 2**20


# ---------------------------------------------------------------------------------------------------------- measurement


def measure(
    cases: list[Case], repeats: int, deadline: float, longest_s: float, rate: float, threads: int, say: Any
) -> list[dict]:
    """Measure cases of one size side by side.

    Args:
        cases: The cases.
        repeats: Steps of each.
        deadline: When to stop, on the clock of `time.monotonic`.
        longest_s: Seconds that one step may be predicted to take.
        rate: Multiply-adds a second that a model may be expected to reach; predicts how long a case takes.
        threads: CPU threads.
        say: Called with a line for each case.

    Returns:
        A row for each case: the case, multiply-adds, and either its steps or why it has none.
    """
    rows, workers = [], {}
    for case in cases:
        row = {**dataclasses.asdict(case), 'steps': []}
        rows.append(row)
        try:
            row['multiply_adds'] = multiply_adds(case) * (3 if case.training else 1)
        except MissingPackage as error:
            row['why_not'] = str(error)
            continue
        need, seconds = predicted_gib(case), row['multiply_adds'] / rate
        if need > 0.9 * available_gib():
            row['why_not'] = f'needs at least {need:,.0f} GiB'
        elif seconds > longest_s:
            row['why_not'] = f'would take about {seconds / 60:,.0f} min'
        elif time.monotonic() + seconds > deadline:
            row['why_not'] = 'no time was left'
        else:
            try:
                worker = Worker(case, threads)
                row['parameters'] = worker.parameters
                if seconds < SLOW_S:
                    row['first_s'] = worker.step()['seconds']  # the warm-up; with compilation, where there is any
                workers[len(rows) - 1] = worker
            except RuntimeError as error:
                row['why_not'] = str(error)
    for i in range(repeats):
        for index, worker in list(workers.items()):
            if i and (
                time.monotonic() > deadline or statistics.median(s['seconds'] for s in rows[index]['steps']) > SLOW_S
            ):
                continue
            try:
                rows[index]['steps'].append(worker.step())
            except RuntimeError as error:
                rows[index]['why_not'] = str(error)
                workers.pop(index).close()
    for worker in workers.values():
        worker.close()
    for row in rows:
        summarise(row)
        what = f'{row["seconds"]:.3f} s, {row["peak_gib"]:.2f} GiB' if row['steps'] else row['why_not']
        mode = 'training' if row['training'] else 'inference'
        say(f'{row["tokens"]:>9,}  {mode} {row["precision"]}  {row["model"]:22} {what}')
    return rows


def earlier(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run found, to be added to.

    Raises:
        ValueError: It was another machine, or other versions.
    """
    old = json.loads(path.read_text())
    differs = [k for k, v in found['machine'].items() if old['machine'][k] != v and k != 'date']
    if differs:
        raise ValueError(f'{path} cannot be updated: it was measured with another {", ".join(differs)}.')
    return {**old, 'command': f'{old["command"]}; {found["command"]}'}


def main(
    output: Path = Path('outputs/benchmark'),
    quick: bool = False,
    models: tuple[str, ...] = CONTENDERS,
    tokens: tuple[int, ...] = (1024, 4096, 16384, 65536, 2**20),
    modes: tuple[Literal['inference', 'training'], ...] = ('inference', 'training'),
    precisions: tuple[Literal['fp32', 'bf16'], ...] = ('fp32', 'bf16'),
    repeats: int = 5,
    max_minutes: float = 60.0,
    max_step_minutes: float = 6.0,
    threads: int = 0,
    update: bool = False,
    worker: str = '',
) -> None:
    """Measure, print a table, and write JSON, Markdown and a picture.

    Args:
        output: Where the files go: OUTPUT.json, .md and .png.
        quick: Two sizes, three repetitions.
        models: What to measure.
        tokens: Sizes, square numbers; above 65,536 linvision alone, inference in bf16.
        modes: 'inference', 'training' or both.
        precisions: 'fp32', 'bf16' or both.
        repeats: Steps of each case, after a warm-up.
        max_minutes: A bound on the whole.
        max_step_minutes: A step that is predicted to take longer is not started.
        threads: CPU threads (0: all cores).
        update: Keep what OUTPUT.json holds of this machine and is not measured now.
        worker: A case in JSON, for the process that takes its steps.
    """
    threads = threads or len(os.sched_getaffinity(0))
    if worker:
        return work(Case(**json.loads(worker)), threads)
    if quick:
        tokens, repeats = tuple(n for n in tokens if n <= 4096), min(repeats, 3)
    deadline = time.monotonic() + 60 * max_minutes
    torch.set_num_threads(threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(['python', '-m', 'scripts.benchmarks.speed', *sys.argv[1:]])
    found = {'machine': machine(threads), 'command': command, 'roofline': {}, 'rows': []}
    if update:
        found = earlier(output.with_suffix('.json'), found)
    groups = [(n, mode == 'training', p) for n in tokens for mode in modes for p in precisions]
    groups = [(n, t, p) for n, t, p in groups if n <= 65536 or (p == 'bf16' and not t)]
    sides = [[Case(m, *group) for m in models if group[0] <= LONGEST.get(m, 65536)] for group in groups]
    for precision in precisions:
        found['roofline'][precision] = roofline(precision, threads, chunk=1024)
    for (_, _, precision), cases in zip(tqdm(groups, disable=None), sides, strict=True):
        rate = 0.25e9 * found['roofline'][precision]['square_gflops']  # half of the rate, two operations
        measured = {dataclasses.astuple(case) for case in cases}
        found['rows'] = [r for r in found['rows'] if tuple(r[k] for k in KEY) not in measured]
        found['rows'] += measure(cases, repeats, deadline, 60 * max_step_minutes, rate, threads, tqdm.write)
        output.with_suffix('.json').write_text(json.dumps(found, indent=1) + '\n')
    write(found, output)


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
