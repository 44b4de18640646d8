"""Why the pixel models are as they are: each choice against its alternatives, at equal training time.

    python scripts/compare_choices.py --minutes 2 --seeds 3

Trains `recipes/fashion_mnist_pixels.py` on 16×16 images (256 tokens) for the same minutes on one thread each, with one
thing changed at a time, and scores a validation slice of the training set (5 %, 3,000 images, drawn by the seed);
the test set is not touched. Writes `docs/choices.json` and `docs/choices.md`.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    'as registered: separable E, conv positions, local path, Muon': [],
    'linear E': ['--model-args', 'projection', 'linear'],
    'full attention': ['--model-args', 'projection', 'none'],
    'separable positions': ['--model-args', 'pos_embed', 'separable'],
    'no local path': ['--model-args', 'local_size', '0'],
    'AdamW, lr 3e-3': ['--opt', 'adamw', '--lr', '3e-3'],
}


def trial(name: str, flags: list[str], seed: int, minutes: float, data_dir: Path, output_dir: Path) -> dict:
    """Train one variant with one seed in a process of its own; its metrics."""
    folder = output_dir / f'{name.split(":")[0].replace(" ", "_")}_{seed}'
    command = [
        sys.executable,
        'recipes/fashion_mnist_pixels.py',
        '--stages',
        '16',
        '1.0',
        '--max-minutes',
        str(minutes),
    ]
    command += ['--val-fraction', '0.05', '--no-test', '--threads', '1', '--precision', 'bf16', '--seed', str(seed)]
    command += ['--data-dir', str(data_dir), '--output-dir', str(folder), *flags]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{name}, seed {seed}: {done.stderr[-500:]}')
    metrics = json.loads((folder / 'metrics.json').read_text())
    print(f'{name}, seed {seed}: {100 * metrics["val_top1"]:.2f} %, {metrics["images_seen"]:,} images', flush=True)
    return {k: metrics[k] for k in ('val_top1', 'val_num_samples', 'images_seen', 'num_parameters', 'train_minutes')}


def main(
    minutes: float = 2.0,
    seeds: int = 3,
    workers: int = 2,
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/choices'),
) -> None:
    """Run the comparison.

    Args:
        minutes: Minutes of training of each run.
        seeds: Runs of each variant.
        workers: Runs at a time, one thread each; the order is by seed, so that all variants meet the same conditions.
        data_dir: Folder that holds the data.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    jobs = [(name, flags, seed) for seed in range(seeds) for name, flags in VARIANTS.items()]
    with ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(lambda job: trial(*job, minutes, data_dir.resolve(), output_dir.resolve()), jobs))
    runs = {name: [row for job, row in zip(jobs, rows, strict=True) if job[0] == name] for name in VARIANTS}
    result = {'minutes': minutes, 'threads': 1, 'precision': 'bf16', 'torch': torch.__version__, 'runs': runs}
    (ROOT / 'docs' / 'choices.json').write_text(json.dumps(result, indent=2) + '\n')
    (ROOT / 'docs' / 'choices.md').write_text(page(result, seeds))


def page(result: dict, seeds: int) -> str:
    """The comparison as a page."""
    lines = [
        '# Why the pixel models are as they are',
        '',
        f'Fashion-MNIST on 16×16 images (256 tokens, K = 64): {result["minutes"]:g} minutes of training on one',
        f'CPU thread in {result["precision"]}, torch {result["torch"]}, two runs at a time. Top-1 on 3,000',
        f'validation images kept from the training set, mean ± standard deviation over {seeds} seeds.',
        '',
        f'    python scripts/compare_choices.py --minutes {result["minutes"]:g} --seeds {seeds}',
        '',
        '| one change | validation top-1 | images seen | parameters |',
        '| --- | --- | --- | --- |',
    ]
    for name, runs in result['runs'].items():
        scores = [100 * run['val_top1'] for run in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else float('nan')
        seen = statistics.mean(run['images_seen'] for run in runs)
        lines.append(
            f'| {name} | {statistics.mean(scores):.1f} ± {spread:.1f} % | {seen:,.0f} | {runs[0]["num_parameters"]:,} |'
        )
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
