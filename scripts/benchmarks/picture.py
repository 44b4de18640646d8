"""Time against tokens, three lines: the picture of the README.

python -m scripts.benchmarks.picture
"""

import json
from pathlib import Path

import tyro

from linvision.guard import guarded
from scripts.benchmarks.tables import COLOURS, pick

LINES = {'ViT, fused': "timm's ViT, fused attention", 'linformer': 'linformer 0.2.3 (PyPI)', 'linvision': 'linvision'}


def main(
    results: Path = Path('scripts/benchmarks/results/speed.json'), output: Path = Path('docs/images/time.png')
) -> None:
    """Draw the picture.

    Args:
        results: What `scripts.benchmarks.speed` wrote.
        output: The picture.
    """
    from matplotlib.figure import Figure

    found = json.loads(results.read_text())
    figure = Figure(figsize=(6.4, 3.4), dpi=150, layout='constrained')
    axis = figure.subplots()
    for model, name in LINES.items():
        rows = [row for row in pick(found, model=model, training=False, precision='fp32') if row['steps']]
        points = sorted((row['tokens'], row['seconds']) for row in rows if row['tokens'] <= 65536)
        tokens, seconds = zip(*points, strict=True)
        axis.loglog(tokens, seconds, 'o-', color=COLOURS[model], label=name)
        axis.annotate(f'{seconds[-1]:.3g} s', (tokens[-1], seconds[-1]), (6, -3), textcoords='offset points')
    axis.set_xticks(tokens, [f'{n:,}' for n in tokens], minor=False)
    axis.minorticks_off()
    axis.set_xlim(right=tokens[-1] * 2)
    axis.set(xlabel='tokens of one image', ylabel='seconds, forward')
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    print(f'{output} is written')


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
