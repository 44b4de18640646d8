"""Do pixels pay? Patches of 1, 2 and 4 pixels on Fashion-MNIST, at equal training time and at equal epochs.

    python scripts/compare_patches.py

Trains `recipes/fashion_mnist_pixels.py` without stages, at 32×32, so that the patch size alone changes: 1,024, 256 and
64 tokens, K = 64, 64 and 16. Scores all 10,000 test images; nothing is chosen by them. Writes `docs/patches.json`,
`docs/patches.md` and `docs/patches.png`.
"""

import json
from pathlib import Path
from typing import Any

import torch
import tyro

from trials import ROOT, mean_and_spread, run_trials

PATCHES = (1, 2, 4)
FIELDS = ('top1', 'num_samples', 'images_seen', 'tokens', 'num_parameters', 'train_minutes', 'threads', 'precision')


def main(
    minutes: float = 4.0,
    epochs: float = 0.5,
    seeds: int = 3,
    workers: int = 2,
    data_dir: Path = Path('data'),
    output_dir: Path = Path('outputs/patches'),
) -> None:
    """Run the comparison.

    Args:
        minutes: Minutes of training of each run at equal time.
        epochs: Epochs of each run at equal epochs.
        seeds: Runs of each patch size.
        workers: Runs at a time, one thread each.
        data_dir: Folder that holds the data.
        output_dir: Folder for the runs; finished ones are not repeated.
    """
    common = {'data_dir': data_dir.resolve(), 'stages': (), 'threads': 1, 'precision': 'bf16'}
    kinds = {'epochs': {'epochs': epochs}, 'minutes': {'max_minutes': minutes}}
    settings = {'minutes': minutes, 'epochs': epochs, 'seeds': seeds}
    result: dict[str, Any] = {'settings': settings, 'torch': torch.__version__}
    for kind, length in kinds.items():
        variants = {f'patch {p}': {**common, **length, 'model': f'linformer_vit_pico_patch{p}_32'} for p in PATCHES}
        runs = run_trials('fashion_mnist_pixels', variants, range(seeds), workers, output_dir / kind)
        result[kind] = {name: [{k: run[k] for k in FIELDS} for run in found] for name, found in runs.items()}
    (ROOT / 'docs' / 'patches.json').write_text(json.dumps(result, indent=2) + '\n')
    (ROOT / 'docs' / 'patches.md').write_text(page(result))
    draw(result, ROOT / 'docs' / 'patches.png')


def page(result: dict[str, Any]) -> str:
    """The comparison as a page."""
    minutes, epochs, seeds = result['settings'].values()
    lines = [
        f'| {kind} | tokens | top-1 | images seen | parameters |\n| --- | --- | --- | --- | --- |\n'
        + '\n'.join(
            f'| {name} | {runs[0]["tokens"]:,} | {mean_and_spread([100 * run["top1"] for run in runs])} % | '
            f'{sum(run["images_seen"] for run in runs) / len(runs):,.0f} | {runs[0]["num_parameters"]:,} |'
            for name, runs in result[key].items()
        )
        for key, kind in (('minutes', f'equal time: {minutes:g} min'), ('epochs', f'equal epochs: {epochs:g}'))
    ]
    return f"""# Do pixels pay?

Fashion-MNIST on a 32×32 canvas, `linformer_vit_pico_patch{{1,2,4}}_32`, one CPU thread in bf16 for each run, torch
{result['torch']}; top-1 on all 10,000 test images, mean ± standard deviation over {seeds} seed(s). The learning
rate is the recipe's and K the models' own: neither was chosen for any of the three. Written by

    python scripts/compare_patches.py --minutes {minutes:g} --epochs {epochs:g} --seeds {seeds}

{lines[0]}

{lines[1]}

![Accuracy by patch size](patches.png)

{conclusion(result)}
"""


def titles(result: dict[str, Any]) -> dict[str, str]:
    """How long the runs of each table were, in words."""
    minutes, epochs, _ = result['settings'].values()
    return {'minutes': f'{minutes:g} minutes', 'epochs': f'{epochs:g} epoch(s)'}


def conclusion(result: dict[str, Any]) -> str:
    """What the figures say, in a sentence for each table."""
    words = []
    for key, title in titles(result).items():
        means = {name: sum(run['top1'] for run in runs) / len(runs) for name, runs in result[key].items()}
        best = max(means, key=means.get)
        others = ', '.join(
            f'{name} {100 * (means[best] - m):.1f} points below' for name, m in means.items() if name != best
        )
        words.append(f'In {title} of training {best} is best, {others}.')
    return ' '.join(words)


def draw(result: dict[str, Any], path: Path) -> None:
    """Top-1 of every run against tokens, one panel for equal time and one for equal epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout='constrained')
    for axis, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles(result).items(), strict=True):
        for name, runs in result[key].items():
            axis.plot([run['tokens'] for run in runs], [100 * run['top1'] for run in runs], 'o', label=name, alpha=0.7)
        axis.set(title=f'{title} on one thread', xlabel='tokens', xscale='log')
        axis.set_xticks([64, 256, 1024], ['64', '256', '1,024'])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.axes[0].set_ylabel('top-1, % of 10,000 test images')
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    tyro.cli(main, description=__doc__)
