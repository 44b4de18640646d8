"""How low-rank a model's attention is, on your images: the paper's figure 1 (arXiv 2006.04768), and which K keeps what.

    linvision spectrum vit_tiny_patch16_224 --data-dir MY_IMAGES --output-dir outputs/spectrum
    linvision spectrum outputs/full_attention --dataset fashion_mnist --proj-len 64 --recommend 0.1

The first argument is a timm ViT with weights, `hf-hub:…`, or the folder of a model; of a Linformer ViT the matrices are
those of its queries and keys without E. Writes `spectrum.json`, `spectrum.md`, `spectrum.png` and TensorBoard's events.
For each layer: the K that keeps a share of the squared singular values (`energy`), mean over heads and for the head
that needs most, the share that the best matrix of rank K keeps, and the share that a projection to K rows keeps: the
model's own (unless its rows are normalised, which loses their scale), or pooling by area. `--recommend LOSS` names the
K of each layer that loses at most so much, as `proj_len` takes it.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from linvision.analysis.figure_text import literal
from linvision.analysis.spectrum import Spectrum, attention_layers, attention_spectrum, own_projection, pooling
from linvision.cli.images import ImagesOf, readable
from linvision.cli.pretrained import load_vit
from linvision.meter import Meter
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.train.parallel import choose_device

LOSSES = (0.5, 0.1, 0.05, 0.01)


def table(spectrum: Spectrum, proj_len: int, name: str) -> str:
    """A line for each layer, mean over heads, and what the head that needs most would need."""
    shares = ' | '.join(f'K for {100 * (1 - loss):g} %' for loss in LOSSES)
    lines = [
        f'| layer | {shares} | for its worst head | best rank {proj_len} keeps | {name} to {proj_len} rows keeps |',
        '| --- ' * (len(LOSSES) + 4) + '|',
    ]
    assert spectrum.projected is not None  # a projection was given
    for layer, energy in enumerate(spectrum.energy.mean(1)):
        lengths = [first(energy, 1 - loss) for loss in LOSSES]
        lengths.append(first(spectrum.energy[layer].min(0).values, 1 - LOSSES[-1]))
        best, made = energy[proj_len - 1].item(), spectrum.projected[layer].mean().item()
        lines.append(f'| {layer} | {" | ".join(lengths)} | {100 * best:.1f} % | {100 * made:.1f} % |')
    return '\n'.join(lines)


def first(energy: torch.Tensor, share: float) -> str:
    """The smallest K that keeps a share, or that more singular values would be needed."""
    enough = (energy >= share).nonzero()
    return str(int(enough[0]) + 1) if len(enough) else f'> {len(energy)}'


def rounded(shares: torch.Tensor) -> Any:
    """Nested lists, to six digits."""
    return shares.double().round(decimals=6).tolist()


def draw(spectrum: Spectrum, proj_len: int, title: str) -> Any:
    """What the first K singular values hold, by layer; and by layer and head the K that keeps 99 % of the energy."""
    from matplotlib.figure import Figure

    values, what = spectrum.cumulative, 'sum of singular values'
    if values is None:
        values, what = spectrum.energy, 'sum of squared singular values'
    figure = Figure(figsize=(11, 4.2), layout='constrained')
    figure.suptitle(literal(title), fontsize=10)
    left, right = figure.subplots(1, 2)
    for layer, shares in enumerate(values.mean(1)):
        colour = str(0.75 * layer / max(1, len(values) - 1))
        left.plot(range(1, len(shares) + 1), shares, color=colour, label=f'layer {layer}')
    left.axvline(proj_len, linestyle=':', label=f'K = {proj_len}')
    left.set(xscale='log', xlabel=f'K of {spectrum.tokens:,}', ylabel=f'share of the {what}', ylim=(0, 1.02))
    left.grid(alpha=0.3)
    left.legend(fontsize=7)
    lengths = (spectrum.energy < 1 - LOSSES[-1]).sum(-1) + 1
    right.imshow(lengths.numpy(), vmin=0, vmax=2 * lengths.max().item(), aspect='auto', cmap='Greys')  # black is read
    for layer, heads in enumerate(spectrum.energy):
        for head, energy in enumerate(heads):
            right.text(head, layer, first(energy, 1 - LOSSES[-1]), ha='center', va='center')
    right.set(xlabel='head', ylabel='layer', title=f'K that keeps {100 * (1 - LOSSES[-1]):g} % of the squares')
    right.set_xticks(range(values.shape[1]))
    right.set_yticks(range(values.shape[0]))
    return figure


def main(
    model: tyro.conf.Positional[str],
    output_dir: Path = Path('outputs/spectrum'),
    checkpoint: str = '',
    img_size: int = 0,
    proj_len: int = 0,
    rank: int = 256,
    recommend: float = 0.0,
    dataset: str = 'image_folder',
    data_dir: Path = Path('data'),
    limit: int = 32,
    batch_size: int = 8,
    on_bad_image: Literal['stop', 'skip'] = 'stop',
    device: str = 'auto',
) -> None:
    """Look into a model.

    Args:
        model: A timm ViT with pretrained weights, `hf-hub:…`, or a folder with a model.
        output_dir: Folder for table, picture, JSON and TensorBoard's events.
        checkpoint: File with the weights, for a timm name.
        img_size: Image size, 0 for the model's own.
        proj_len: K that is looked at, 0 for the model's own, or a quarter of the tokens.
        rank: Singular values of sequences that are too long to be decomposed whole.
        recommend: Share of the energy that may be lost: names a K for each layer.
        dataset: Name of the data set.
        data_dir: Folder that holds the data.
        limit: Test images, 0 for all.
        batch_size: Images in a batch.
        on_bad_image: What becomes of an image that cannot be read: an error that names it, or it is left out.
        device: Torch device; 'auto' takes the accelerator if there is one.
    """
    import matplotlib.figure  # noqa: F401  (what is missing is said before the work, not after it)
    from torch.utils.tensorboard import SummaryWriter

    where = choose_device(device)
    net: Any = load_vit(model, checkpoint, img_size).to(where)
    attention_layers(net)  # refuses what has none
    projects = isinstance(net, LinformerVisionTransformer) and net.projection is not None
    # rows that are normalised have lost their scale: E alone says nothing of P
    own = projects and not net.blocks[0].attn.row_norm
    if own and len(set(net.projection.proj_len)) > 1:
        raise ValueError(f'The layers have different K, {net.projection.proj_len}: pictures are of one K.')
    if own and proj_len not in (0, net.projection.proj_len[0]):
        raise ValueError(f'The model projects to {net.projection.proj_len[0]} rows, and not to {proj_len}.')
    tokens = net.patch_embed.num_patches
    K = proj_len or (net.projection.proj_len[0] if projects else tokens // 4)
    if not 1 <= K <= tokens:
        raise ValueError(f'proj_len must lie between 1 and the {tokens:,} tokens, got {K}.')
    projection, name = (own_projection(net), 'its projection') if own else (pooling(net, K), 'pooling')
    images = ImagesOf(net, dataset, data_dir, batch_size, where, on_bad_image)
    batches = images.batches('test', limit)
    matrices = batches.order.n * len(net.blocks)
    with Meter('decomposing', matrices, 'layers of images') as meter:
        ordered = readable(batches.ordered(images.size))
        spectrum = attention_spectrum(net, ordered, max(rank, K), projection, progress=meter.at)
    lines = table(spectrum, K, name)
    report = {'model': model, 'tokens': tokens, 'proj_len': K, 'projection': name, 'num_samples': spectrum.num_samples}
    assert spectrum.projected is not None  # a projection was given
    report |= {'energy': rounded(spectrum.energy), 'projected': spectrum.projected.tolist()}
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / 'spectrum.json').write_text(json.dumps(report) + '\n')
    (output_dir / 'spectrum.md').write_text(lines + '\n')
    figure = draw(spectrum, K, f'{model}, {spectrum.num_samples} images')
    figure.savefig(output_dir / 'spectrum.png', dpi=110)
    with SummaryWriter(output_dir) as writer:
        writer.add_figure('spectrum', figure)
        writer.add_text('spectrum', lines)
    print(lines)
    if recommend:
        lengths = spectrum.lengths(recommend)
        report['recommended'] = {'loss': recommend, 'proj_len': lengths}
        (output_dir / 'spectrum.json').write_text(json.dumps(report) + '\n')
        print(f"proj_len={lengths}, sharing='key_value' loses at most {recommend:g} a layer; for linvision convert:")
        print(f'  --proj-len {" ".join(map(str, lengths))} --sharing key_value')
