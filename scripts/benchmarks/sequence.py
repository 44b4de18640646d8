"""One image over several processes against one process of as many threads: time, and memory of each process.

    python -m scripts.benchmarks.sequence                                  # writes outputs/sequence.json
    python -m scripts.benchmarks.sequence --tokens 65536 --model linformer_vit_tiny_patch1_256
    python -m scripts.benchmarks.sequence --tokens 4194304 --no-training --no-alone     # two processes only

The model goes from pixels to logits (K = 256, separable E), in processes on one machine that talk over gloo. A training
step is forward, backward and the mean of the gradients by DDP. Both ways take turns. Times are medians, of the slowest
process. Memory is the peak of the resident set in a step, above what a process held with its model and its pixels made,
of the process that took most. Leave the cores idle.
"""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import linvision  # noqa: F401  (registers the models)
from linvision.guard import guarded
from linvision.models.band import band_rows
from linvision.train.precision import DTYPES
from scripts import ROOT
from scripts.benchmarks.contenders import Case
from scripts.benchmarks.machine import machine
from scripts.benchmarks.speed import memory_gib


@dataclass(frozen=True)
class Way:
    """How an image is handled.

    Attributes:
        model: A registered name.
        tokens: N, a square number; every pixel is a token.
        training: Forward and backward under autocast, instead of forward in the precision itself.
        precision: 'fp32' or 'bf16'.
        processes: How many share the image.
        threads: Of each.
    """

    model: str
    tokens: int
    training: bool
    precision: str
    processes: int
    threads: int


def work(way: Way, rank: int, port: int, steps: int) -> None:
    """Take steps in one of the processes; a line of JSON for each."""
    torch.set_num_threads(way.threads)
    torch.manual_seed(0)
    dtype, side = DTYPES[way.precision], Case('linvision', way.tokens, way.training, way.precision).img_size
    model: Any = timm.create_model(way.model, img_size=side).train(way.training)
    learner = model
    if way.processes > 1:
        dist.init_process_group('gloo', f'tcp://localhost:{port}', rank=rank, world_size=way.processes)
        model.share_images(init_device_mesh('cpu', (way.processes,)))
        learner = DistributedDataParallel(model) if way.training else model
    own = band_rows(side, rank, way.processes)
    x = torch.randn(1, 3, own.stop - own.start, side)
    if not way.training:
        model, x = model.to(dtype), x.to(dtype)

    def step() -> None:
        if not way.training:
            with torch.inference_mode():
                model(x)
            return
        model.zero_grad(set_to_none=True)
        with torch.autocast('cpu', dtype, enabled=way.precision != 'fp32'):
            loss = F.cross_entropy(learner(x).float(), torch.zeros(1, dtype=torch.long))
        loss.backward()

    torch.nn.functional.gelu(torch.randn(64, 64, dtype=dtype) @ torch.randn(64, 64, dtype=dtype))  # loads the libraries
    base = memory_gib('VmRSS')
    for _ in range(steps):
        if way.processes > 1:
            dist.barrier()
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts afresh
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(json.dumps({'seconds': seconds, 'peak_gib': memory_gib('VmHWM') - base}), flush=True)
    if way.processes > 1:
        dist.destroy_process_group()


def run(way: Way, steps: int) -> list[dict[str, float]]:
    """Steps of all processes of a way: for each step the longest time and the highest peak.

    Raises:
        RuntimeError: A process ended early.
    """
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = {**os.environ, 'OMP_NUM_THREADS': str(way.threads)}
    command = [sys.executable, '-m', 'scripts.benchmarks.sequence', '--worker', json.dumps(dataclasses.asdict(way))]
    started = [
        subprocess.Popen(
            [*command, '--rank', str(rank), '--port', str(port), '--steps', str(steps)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for rank in range(way.processes)
    ]
    said = [process.communicate()[0].splitlines() for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f'A process of {way} ended early: {[process.returncode for process in started]}.')
    steps_taken = zip(*([json.loads(line) for line in lines] for lines in said), strict=False)
    return [{name: max(step[name] for step in same) for name in ('seconds', 'peak_gib')} for same in steps_taken]


def measure(ways: list[Way], rounds: int, steps: int, say: Any) -> list[dict[str, Any]]:
    """Ways in turn; of each its median time and its highest peak. The first of several steps does not count."""
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            taken = run(way, steps)
            found[way] += taken[1:] or taken
            say(f'round {number + 1} of {rounds}, {way}: {taken[-1]}')
    return [
        {
            **dataclasses.asdict(way),
            'steps': len(taken),
            'seconds': statistics.median(step['seconds'] for step in taken),
            'peak_gib': max(step['peak_gib'] for step in taken),
        }
        for way, taken in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with their ratio to one process."""
    lines = [
        '| model | tokens | | processes × threads | steps | seconds | GiB each | time | memory |',
        '|' + ' --- |' * 9,
    ]
    for row in rows:
        same = [r for r in rows if r['processes'] == 1 and all(r[k] == row[k] for k in ('model', 'tokens', 'training'))]
        ratios = [f'{row[k] / same[0][k]:.2f}' if same else '' for k in ('seconds', 'peak_gib')]
        lines.append(
            f'| {row["model"]} | {row["tokens"]:,} | {"training" if row["training"] else "forward"}, '
            f'{row["precision"]} | {row["processes"]} × {row["threads"]} | {row["steps"]} | {row["seconds"]:.2f} | '
            f'{row["peak_gib"]:.2f} | {" | ".join(ratios)} |'
        )
    return '\n'.join(lines)


def main(
    model: str = 'linformer_vit_pico_patch1_256',
    tokens: tuple[int, ...] = (65536, 1048576),
    processes: int = 2,
    precision: str = 'bf16',
    training: bool = True,
    alone: bool = True,
    rounds: int = 3,
    steps: int = 3,
    output: Path = Path('outputs/sequence.json'),
    worker: str = '',
    rank: int = 0,
    port: int = 0,
) -> None:
    """Measure.

    Args:
        model: A registered model of one token a pixel.
        tokens: Tokens of an image, square numbers.
        processes: Processes that share it, of one thread each.
        precision: 'fp32' or 'bf16'.
        training: A training step too.
        alone: One process of as many threads too.
        rounds: How often the ways take turns.
        steps: Steps in each.
        output: What receives the figures; those of other ways in it stay.
        worker: A way as JSON: this is one of its processes.
        rank: Which one.
        port: Where they meet.
    """
    if worker:
        work(Way(**json.loads(worker)), rank, port, steps)
        return
    rows = json.loads(output.read_text())['rows'] if output.is_file() else []
    for n in tokens:
        for learns in (False, True)[: 1 + training]:
            ways = [Way(model, n, learns, precision, processes, 1)]
            ways += [Way(model, n, learns, precision, 1, processes)] * alone
            asked = [dataclasses.asdict(way) for way in ways]
            rows = [row for row in rows if {name: row[name] for name in asked[0]} not in asked]
            rows += measure(ways[::-1], rounds, steps, tqdm.write)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps({**machine(processes), 'rows': rows}, indent=2) + '\n')
    print(table(rows))


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
