"""Tables of runs, and where a study's figures, tables and pictures go.

A table is made of rows, runs by what was trained, one run a seed; and of columns, a title and a function that writes a
cell. A cell sees all rows, so that it can compare.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts import ROOT

RESULTS = Path(__file__).parent / 'results'
DOCS = ROOT / 'docs'  # pictures in images/
Runs = list[dict[str, Any]]
Rows = dict[Any, Runs]
Cell = Callable[[Any, Rows], str]


def mean_and_spread(values: list[float]) -> str:
    """The mean, and the standard deviation where there are several: '83.2 ± 1.1'."""
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'


def per_cent(field: str) -> Cell:
    """Mean and spread of a share."""
    return lambda key, rows: f'{mean_and_spread([100 * run[field] for run in rows[key]])} %'


def points_above(reference: str, field: str = 'top1') -> Cell:
    """How far a share lies above another row's, and the standard error of that from its seeds, pair by pair.

    Args:
        reference: Key of the other row; where keys are tuples, its last part.
        field: The metric.
    """

    def cell(key: Any, rows: Rows) -> str:
        other = (*key[:-1], reference) if isinstance(key, tuple) else reference
        if key == other:
            return ''
        ours, theirs = ([100 * run[field] for run in rows[k]] for k in (key, other))
        distance = f'{statistics.mean(ours) - statistics.mean(theirs):+.1f}'
        if len(ours) != len(theirs) or len(ours) < 2:
            return distance
        above = [a - b for a, b in zip(ours, theirs, strict=True)]
        return f'{distance} (s.e. {statistics.stdev(above) / len(above) ** 0.5:.1f})'

    return cell


def minutes(key: Any, rows: Rows) -> str:
    """Minutes of training of the seed that was disturbed least by what else the machine did."""
    found = [run['train_minutes'] for run in rows[key] if 'train_minutes' in run]
    return f'{min(found):.1f}' if found else ''


CELLS: dict[str, Cell] = {  # by title
    'tokens': lambda key, rows: f'{rows[key][0]["tokens"]:,}',
    'top-1': per_cent('top1'),
    'validation top-1': per_cent('val_top1'),
    'images seen': lambda key, rows: f'{statistics.mean(run["images_seen"] for run in rows[key]):,.0f}',
    'parameters': lambda key, rows: f'{rows[key][0]["num_parameters"]:,}',
    'training, min': minutes,
    'seeds': lambda key, rows: str(len(rows[key])),
}


def table(columns: dict[str, Cell | None], rows: Rows) -> str:
    """A Markdown table with a line for each row.

    Args:
        columns: Cells by title; None takes that of `CELLS`.
        rows: Runs by what was trained.
    """
    cells = [cell or CELLS[title] for title, cell in columns.items()]
    lines = [list(columns), ['---'] * len(columns), *([cell(key, rows) for cell in cells] for key in rows)]
    return '\n'.join(''.join(f'| {text} ' if text else '| ' for text in line) + '|' for line in lines)


def write_table(name: str, text: str, page: Path | None = None) -> None:
    """Put a table between its marks, `<!-- NAME -->` and `<!-- /NAME -->`, in a page (`docs/results.md` by default).

    Raises:
        ValueError: The page has no such marks.
    """
    page = page or DOCS / 'results.md'
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    before, found, rest = page.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f'{page} has no place for the table: {start} and {end} on lines of their own.')
    page.write_text(f'{before}{start}\n{text}\n{end}{after}')


def publish(name: str, result: dict[str, Any], text: str, page: str = 'results.md', mark: str = '') -> None:
    """Write `results/NAME.json` and a table into its page of `docs/`, and print the table.

    Args:
        name: Of the study.
        result: All that it found.
        text: The table.
        page: The page.
        mark: Where in it; the study's name by default.
    """
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{name}.json').write_text(json.dumps(result, indent=2) + '\n')
    write_table(mark or name, text, DOCS / page)
    print(text)
