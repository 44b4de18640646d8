"""The tables and the picture of `speed.py` and `gpu_report.py`, from their JSON."""

import json
import statistics
from pathlib import Path
from typing import Any

PAPER = {4096: (3.4, 14), 16384: (8.6, 56), 65536: (20, 60)}  # arXiv 2006.04768, table 3, k = 128: faster, less memory
COLOURS = {
    'linvision': '#c1121f',
    'linvision, whole': '#f4a261',
    'linvision, streamed': '#9d0208',
    'linvision, compiled': '#7b2cbf',
    'linvision, CUDA graphs': '#c77dff',
    'linvision, linear E': '#e76f51',
    'linvision, K = 128': '#ffb703',
    'ViT, fused': '#1d3557',
    'ViT, written out': '#457b9d',
    'linformer': '#2a9d8f',
    'linformer-pytorch': '#588157',
    'xcit': '#8d99ae',
}


def pick(found: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The rows with the given values."""
    return [row for row in found['rows'] if all(row[k] == v for k, v in wanted.items())]


def unique(found: dict[str, Any], *names: str) -> list[Any]:
    """The values, or tuples of values, that occur, in their order."""
    values = [row[names[0]] if len(names) == 1 else tuple(row[n] for n in names) for row in found['rows']]
    return list(dict.fromkeys(values))


def number(x: float) -> str:
    """Three digits that count."""
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def ratio(row: dict[str, Any], other: dict[str, Any], field: str) -> str:
    """How many times more the other one takes, or why that is not known."""
    if not other['steps'] or not row['steps']:
        return (other if not other['steps'] else row).get('why_not', 'no time was left')
    own, others = (r[field] / r.get('batch_size', 1) for r in (row, other))  # an image
    return f'{number(others / max(own, 1e-9))}×'


def times_and_memory(found: dict[str, Any], training: bool, precision: str) -> list[str]:
    """A table: a line for each model, a column for each size; seconds, GiB, and seconds beside linvision's."""
    sizes = sorted(unique(found, 'tokens'))
    lines = ['| | ' + ' | '.join(f'{n:,}' for n in sizes) + ' |', '| --- |' + ' --- |' * len(sizes)]
    for model in unique(found, 'model'):
        cells = []
        for n in sizes:
            row = next(iter(pick(found, model=model, tokens=n, training=training, precision=precision)), None)
            own = next(iter(pick(found, model='linvision', tokens=n, training=training, precision=precision)), None)
            if row is None:
                cells.append('')
            elif not row['steps']:
                cells.append(row.get('why_not', 'no time was left'))
            else:
                beside = f' ({ratio(own, row, "seconds")})' if own and own is not row else ''
                cells.append(f'{number(row["seconds"])} s{beside}, {number(row["peak_gib"])} GiB')
        lines.append(f'| {model} | ' + ' | '.join(cells) + ' |')
    return lines


def paper(found: dict[str, Any]) -> list[str]:
    """The paper's table 3 at k = 128, beside what was measured here."""
    lines = [
        '| tokens | paper, k = 128 | here, against attention written out | here, against fused attention |',
        '| --- | --- | --- | --- |',
    ]
    for n, (faster, less) in PAPER.items():
        for precision in unique(found, 'precision'):
            rows = {row['model']: row for row in pick(found, tokens=n, training=False, precision=precision)}
            if 'linvision, K = 128' not in rows:
                continue
            own, cells = rows['linvision, K = 128'], []
            for other in ('ViT, written out', 'ViT, fused'):
                if other not in rows:
                    cells.append('')
                    continue
                faster_here, less_here = (ratio(own, rows[other], field) for field in ('seconds', 'peak_gib'))
                both = f'{faster_here} faster, {less_here} less memory' if rows[other]['steps'] else faster_here
                cells.append(both)
            lines.append(f'| {n:,}, {precision} | {faster}× faster, {less}× less memory | ' + ' | '.join(cells) + ' |')
    return lines if len(lines) > 2 else []


def shares(found: dict[str, Any]) -> list[str]:
    """How near linvision comes to the machine's rate."""
    lines = []
    for precision, rates in found['roofline'].items():
        for row in sorted(
            pick(found, model='linvision', training=False, precision=precision), key=lambda row: row['tokens']
        ):
            if row['steps']:
                gflops = 2e-9 * row['multiply_adds'] / row['seconds']
                lines.append(
                    f'| {row["tokens"]:,}, {precision} | {number(gflops)} | '
                    f'{100 * gflops / rates["square_gflops"]:.0f} % of {number(rates["square_gflops"])} | '
                    f'{100 * gflops / rates["shapes_gflops"]:.0f} % of {number(rates["shapes_gflops"])} |'
                )
    head = [
        '| linvision, inference | GFLOP/s | of a large square product | of its own products alone |',
        '| --- | --- | --- | --- |',
    ]
    return head + lines if lines else []


def attention(found: dict[str, Any]) -> list[str]:
    """Attention alone, forward and backward (`gpu_report.py`)."""
    rows = found.get('attention', [])
    names = list(dict.fromkeys(row['attention'] for row in rows))
    lines = ['| tokens | ' + ' | '.join(names) + ' |', '| --- |' + ' --- |' * len(names)]
    for n in dict.fromkeys(row['tokens'] for row in rows):
        cells = []
        for row in (r for r in rows if r['tokens'] == n):
            ran = f'{number(1000 * row["seconds"])} ms, {number(row["peak_gib"])} GiB' if row['steps'] else ''
            cells.append(ran or row.get('why_not', 'no time was left'))
        lines.append(f'| {n:,} | ' + ' | '.join(cells) + ' |')
    return lines if rows else []


def details(found: dict[str, Any]) -> list[str]:
    """Which attention ran, how many kernels, and joules an image (`gpu_report.py`)."""
    lines = [
        '| | images | attention that ran | kernels of a step | their ms | longest | J an image |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for row in found.get('detail', []):
        name = f'{row["model"]}, {row["tokens"]:,} tokens, {"training" if row["training"] else "inference"}'
        if 'kernels' not in row:
            lines.append(f'| {name} | {row["batch_size"]} | {row.get("why_not", "")} | | | | |')
            continue
        ran = row['attention_ran']
        ran = ran if isinstance(ran, str) else ', '.join(f'{k.removeprefix("aten::")} × {v}' for k, v in ran.items())
        longest = '; '.join(f'{k[:40]} {number(v)} ms' for k, v in list(row['longest_ms'].items())[:2])
        joules = number(row['joules'] / row['batch_size']) if 'joules' in row else row.get('no_energy', '')
        lines.append(
            f'| {name} | {row["batch_size"]} | {ran} | {row["kernels"]:,} | {number(row["kernels_ms"])} | {longest} | '
            f'{joules} |'
        )
    return lines if found.get('detail') else []


def learnt(found: dict[str, Any]) -> list[str]:
    """What was learnt in some minutes (`gpu_report.py`)."""
    lines = ['| model | top-1 | minutes | epochs | images/s | GiB |', '| --- | --- | --- | --- | --- | --- |']
    for row in found.get('learn', []):
        if 'why_not' in row:
            lines.append(f'| {row["model"]} | {row["why_not"]} | | | | |')
            continue
        cells = [f'{100 * row["top1"]:.2f} %', *(number(row[k]) for k in ('train_minutes', 'epochs', 'images_per_s'))]
        lines.append(f'| {row["model"]} | ' + ' | '.join([*cells, number(row['peak_memory_gib'])]) + ' |')
    return lines if found.get('learn') else []


def spread(found: dict[str, Any]) -> str:
    """How far apart the repetitions of a case lie, in words."""
    times = [[s['seconds'] for s in row['steps']] for row in found['rows'] if len(row['steps']) > 1]
    spreads = sorted(max(t) / min(t) - 1 for t in times)
    if not spreads:
        return 'Each was taken once.'
    half, most = (100 * spreads[int(q * (len(spreads) - 1))] for q in (0.5, 0.9))
    once = sum(len(row['steps']) == 1 for row in found['rows'])
    compiled = [row['first_s'] for row in found['rows'] if row['model'] == 'linvision, compiled' and 'first_s' in row]
    words = f' The first compiled step takes up to {max(compiled):.0f} s.' if compiled else ''
    return (
        f'The slowest repetition is longer than the fastest by {half:.0f} % (median over cases) and {most:.0f} % (nine '
        f'in ten); {once} cases were taken once.{words}'
    )


def markdown(found: dict[str, Any]) -> str:
    """The whole report."""
    machine = found['machine']
    versions = ', '.join(f'{k} {v}' for k, v in machine['versions'].items())
    parts = [
        f'`{found["command"]}`, {machine["date"]}: {machine.get("device", machine["cpu"])}, '
        f'{machine["threads"]} CPU threads, {versions}.\n\n'
        'Seconds (median) of one step, how many times those of linvision, and the peak of memory above the model. '
        + spread(found)
    ]
    for training, precision in unique(found, 'training', 'precision'):
        title = f'### {"Training step" if training else "Inference"}, {precision}'
        parts.append('\n'.join([title, '', *times_and_memory(found, training, precision)]))
    if paper(found):
        parts.append('\n'.join(["### The paper's table", '', *paper(found)]))
    if shares(found):
        parts.append('\n'.join(['### Share of what the machine can do', '', *shares(found)]))
    for row in found.get('long', []):
        ran = f'{number(row["seconds"])} s, {number(row["peak_gib"])} GiB' if row['steps'] else row.get('why_not', '')
        parts.append(f'One image of {row["tokens"]:,} tokens, inference: {ran}.')
    alone = 'Attention alone, forward and backward'
    if found.get('attention'):
        alone += f', B{found["attention"][0]["batch_size"]} H8 d64 K256'
    for title, lines in (
        (alone, attention(found)),
        ('Kernels and energy', details(found)),
        ('CIFAR-10 by the pixel, learnt in minutes (JPEG copy)', learnt(found)),
    ):
        if lines:
            parts.append('\n'.join([f'### {title}', '', *lines]))
    return '\n\n'.join(parts) + '\n'


def summarise(row: dict[str, Any]) -> None:
    """Add the median of a row's seconds and its peak of memory, where it has steps."""
    if row['steps']:
        row['seconds'] = statistics.median(s['seconds'] for s in row['steps'])
        row['peak_gib'] = max(s['peak_gib'] for s in row['steps'])


def write(found: dict[str, Any], output: Path) -> None:
    """OUTPUT.json, .md and .png; the tables are printed too."""
    output.with_suffix('.json').write_text(json.dumps(found, indent=1) + '\n')
    text = markdown(found)
    output.with_suffix('.md').write_text(text)
    draw(found, output.with_suffix('.png'))
    print(text)


def draw(found: dict[str, Any], path: Path) -> None:
    """Time and memory against tokens, both axes logarithmic: a column for each mode and precision."""
    from matplotlib.figure import Figure

    columns = unique(found, 'training', 'precision')
    figure = Figure(figsize=(1.5 + 4 * len(columns), 8.5), layout='constrained')
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey='row')
    for column, (training, precision) in enumerate(columns):
        for model in unique(found, 'model'):
            rows = [r for r in pick(found, model=model, training=training, precision=precision) if r['steps']]
            rows.sort(key=lambda row: row['tokens'])
            for ax, field in zip(axes[:, column], ('seconds', 'peak_gib'), strict=True):
                style = {'lw': 3, 'zorder': 5} if model == 'linvision' else {'lw': 1.5}
                x, y = [r['tokens'] for r in rows], [max(r[field], 1e-3) for r in rows]
                ax.loglog(x, y, 'o-', ms=4, color=COLOURS.get(model, 'black'), label=model, **style)
        axes[0, column].set_title(f'{"training step" if training else "inference"}, {precision}')
        axes[1, column].set_xlabel('tokens')
        sizes = sorted(unique(found, 'tokens'))
        axes[1, column].set_xticks(sizes, [f'{n:,}' for n in sizes], rotation=30)
        axes[1, column].minorticks_off()
    axes[0, 0].set_ylabel('seconds a step')
    axes[1, 0].set_ylabel('GiB above the model')
    for ax in axes.ravel():
        ax.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=5)
    machine = found['machine']
    name = machine.get('device', f'{machine["cpu"]}, {machine["threads"]} threads')
    figure.suptitle(f'{name}; D = 192, 12 layers, 3 heads, K = 256, one image')
    figure.savefig(path, dpi=100)
