"""The model card of weights that come with the package: what they are, how they were made, what they are worth.

    python -m scripts.tools.model_card linformer_vit_pico_patch1_32.fashion_mnist

Reads `config.json` and `metrics.json` in `linvision/weights/NAME.TAG/`, and writes `README.md` there.
Beside the score stand softmax regression and a plain CNN of equal size, which are trained once and kept in
`baselines.json`: remove that to train them again. A `note` there, by hand, says what their figures do not.
"""

import json
from pathlib import Path
from typing import Any

import torch
import tyro

from linvision.data.recorded import read_metrics, recorded_data
from linvision.guard import guarded
from linvision.train.pretrained import check_folder
from scripts import ROOT
from scripts.tools.plain_cnn import train_cnn
from scripts.tools.softmax_regression import softmax_regression

LICENCES = {
    'cifar10': 'made for research, without a licence of its own (Krizhevsky, Learning multiple layers of features from '
    'tiny images, 2009)',
    'fashion_mnist': 'MIT (Zalando Research, arXiv 1708.07747)',
    'tiny_imagenet': 'for research and education that is not commercial, as ImageNet is (Stanford CS231n, after '
    'Russakovsky et al., arXiv 1409.0575)',
}
LIMITS = {
    'cifar10': 'Ten kinds of animals and vehicles, each alone and large in a photograph of 32×32 pixels: the model has '
    'seen nothing else, and says one of the ten to any image.',
    'fashion_mnist': 'Ten kinds of clothes, each alone, in grey, upright and in the middle of 28×28 pixels: the model '
    'has seen nothing else, and says one of the ten to any image. Some labels of the set are doubtful (shirt, T-shirt '
    'and pullover above all).',
    'tiny_imagenet': 'Two hundred kinds of animals and things in photographs of 64×64 pixels, a few of them several '
    'times or in a corner: the model says one of the two hundred to any image, and to many a photograph of its own set '
    'a wrong one. Take it as a backbone.',
}

SCORED = {'tiny_imagenet': 'validation'}  # images that scores are of, where they are not called test images


def baselines(
    folder: Path, dataset: str, data_dir: Path, minutes: float, shift: int = 0, softmax: bool = True
) -> dict[str, Any]:
    """Scores of softmax regression and of the plain CNN on the same data, trained unless they are kept."""
    kept = folder / 'baselines.json'
    if not kept.is_file():
        found = {'plain CNN': train_cnn(dataset, data_dir, minutes, shift=shift)}
        if softmax:
            own = softmax_regression(dataset, data_dir)
            own['train_minutes'] = own.pop('train_seconds') / 60
            found['softmax regression'] = own
        kept.write_text(json.dumps(found, indent=2) + '\n')
    return json.loads(kept.read_text())


def row(title: str, scores: dict[str, Any]) -> str:
    """A line of the card's table."""
    seen = f'{scores["images_seen"]:,}' if 'images_seen' in scores else ''
    return (
        f'| {title} | {100 * scores["top1"]:.2f} % | {scores["num_parameters"]:,} | {seen} | '
        f'{scores["train_minutes"]:.1f} min |'
    )


def schedule(recipe: dict[str, Any]) -> str:
    """How a run trained, in words."""
    of = 'time' if recipe['max_minutes'] else 'steps'
    stages = ', then '.join(f'{100 * share:.0f} % of the {of} at {size}×{size}' for size, share in recipe['stages'])
    length = f'{recipe["max_minutes"]:g} minutes' if recipe['max_minutes'] else f'{recipe["epochs"]:g} epochs'
    return (
        f'{length}; {stages}; batches of {recipe["batch_size"]}, {recipe["opt"]}, learning rate {recipe["lr"]:g}, flips'
    )


def card(
    name: str,
    config: dict[str, Any],
    metrics: dict[str, Any],
    others: dict[str, Any],
) -> str:
    """The card as Markdown, with the front matter of the Hugging Face Hub.

    Args:
        name: Name of the weights.
        config: Their `config.json`.
        metrics: Those of the run that made them.
        others: Scores to compare with, and a note.
    """
    side = round(config['pretrained_cfg']['input_size'][1] / metrics['tokens'] ** 0.5)
    token = 'a pixel' if side == 1 else f'for {side}×{side} pixels'
    recipe, cfg, cnn, tag = metrics['recipe'], config['pretrained_cfg'], others['plain CNN'], name.partition('.')[2]
    file = f'recipes/{Path(recipe["output_dir"]).name}.py'
    channels, height, width = cfg['input_size']
    note = others.pop('note', '')
    described = f'{tag} ({metrics["data_note"]})' if 'data_note' in metrics else tag
    time, seen = (cnn[field] / metrics[field] for field in ('train_minutes', 'images_seen'))
    rows = '\n'.join(row(title, scores) for title, scores in {f'**{name}**': metrics, **others}.items())
    return f"""---
license: {cfg['license']}
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, linvision]
datasets: [{tag}]
---
# {name}

A Linformer vision transformer over {metrics['tokens']:,} tokens, one {token}, trained from scratch by linvision.

```python
import timm, linvision

model = timm.create_model('{name}', pretrained=True).eval()  # {channels} channel(s), {height}×{width}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = model.pretrained_cfg['label_names']
```

| {metrics['num_samples']:,} {SCORED.get(tag, 'test')} images | top-1 | parameters | images seen | training |
| --- | --- | --- | --- | --- |
{rows}

One seed each. The model: {metrics['threads']} CPU thread(s), {metrics['precision']}, torch
{metrics['versions']['torch']}. The plain CNN (`scripts/tools/plain_cnn.py`): {cnn['threads']} CPU thread(s),
{cnn['precision']}, torch {cnn['versions']['torch']}; it had {time:.0%} of the model's time and saw {seen:.0%} of its
images.{note and ' ' + note}

    python {file} --threads {metrics['threads']} --precision {metrics['precision']}
    linvision evaluate {name} --data-dir data
    python -m scripts.tools.model_card {name} --minutes {cnn['train_minutes']:.0f}

- **Recipe**: `{file}`: {schedule(recipe)}.
- **Data**: {described}, all training images; {LICENCES[tag]}. Normalised by mean
  {cfg['mean']} and deviation {cfg['std']}.
- **Licence of the weights**: {cfg['license']}.
- **Limits**: {LIMITS[tag]}

Written by `scripts/tools/model_card.py`.
"""


def main(
    name: tyro.conf.Positional[str],
    minutes: float = 20.0,
    threads: int = 1,
    softmax: bool = True,
    dataset: str = '',
    data_dir: Path = Path('data'),
) -> None:
    """Write a card.

    Args:
        name: Folder in `linvision/weights/`.
        minutes: Minutes of training of the plain CNN, unless it is kept.
        threads: CPU threads of the baselines.
        softmax: Softmax regression too; all pixels of the set must fit into memory as floats.
        dataset: Name of the data set; by default that of the weights.
        data_dir: Folder that holds the data.
    """
    torch.set_num_threads(threads)
    folder = ROOT / 'linvision' / 'weights' / name
    check_folder(folder)
    config, metrics = json.loads((folder / 'config.json').read_text()), read_metrics(folder / 'metrics.json')
    dataset, data_dir, _ = recorded_data(folder, metrics, dataset, data_dir)
    others = baselines(folder, dataset, data_dir, minutes, metrics['recipe']['shift'], softmax)
    (folder / 'README.md').write_text(card(name, config, metrics, others))


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
