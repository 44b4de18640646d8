"""What several GPUs would gain on one image, on paper: a model, never a measurement.

    python -m scripts.benchmarks.sequence_estimate          # the table of docs/sequence.md

One training step of one image, every pixel a token, with linformer_vit_tiny (12 layers, D = 192, K = 256, bf16). Time
on one card is that of `gpu_count.py` (docs/gpu_count.md: 96.2 ms for 8 × 65,536 tokens; all of it grows with N),
divided by the number of cards, but no less than it takes to launch 1,191 kernels. Beside it, for each layer, forward
and backward:

- an all-reduce of K·D fp32 numbers: 2 (S − 1) / S of these bytes at the rate of the link, and a wait;
- an exchange of a row of the token grid with each neighbour, D bf16 numbers a token, and a wait.

Nothing overlaps: what is added is an upper bound. Within a machine eight cards talk over NVLink (450 GB/s one way, by
NVIDIA's data sheet of the H100); several machines over one 400 Gbit/s InfiniBand port a card. The waits, 20 and 60
microseconds, are assumptions.
"""

from math import sqrt

from linvision.guard import guarded

LAYERS, WIDTH, ROWS = 12, 192, 256
MS_PER_TOKEN = 96.2 / (8 * 65536)
LAUNCH_MS = 7.1
LINKS = {8: ('NVLink', 450e9, 0.020), 64: ('InfiniBand', 50e9, 0.060)}  # up to so many cards: bytes/s, wait in ms
TOKENS, CARDS = (2**20, 2**22, 2**24), (1, 8, 16, 32, 64)


def exchange_ms(tokens: int, cards: int) -> tuple[str, float, float]:
    """The link, and the time of all-reduces and of neighbours' rows in a step."""
    if cards == 1:
        return '', 0.0, 0.0
    link, rate, wait = LINKS[min(most for most in LINKS if cards <= most)]
    reduced = 2 * (cards - 1) / cards * 4 * ROWS * WIDTH / rate * 1e3 + wait
    row = 2 * WIDTH * sqrt(tokens) / rate * 1e3 + wait
    return link, 2 * LAYERS * reduced, 2 * LAYERS * row


def table() -> str:
    """A row for each number of tokens and cards, in Markdown."""
    lines = [
        '| tokens | cards | link | compute ms | all-reduce ms | neighbours ms | step ms | faster | of ideal |',
        '|' + ' --- |' * 9,
    ]
    for tokens in TOKENS:
        for cards in CARDS:
            compute = max(LAUNCH_MS, MS_PER_TOKEN * tokens / cards)
            link, reduced, rows = exchange_ms(tokens, cards)
            step, alone = compute + reduced + rows, max(LAUNCH_MS, MS_PER_TOKEN * tokens)
            lines.append(
                f'| {tokens:,} | {cards} | {link} | {compute:.1f} | {reduced:.2f} | {rows:.2f} | {step:.1f} | '
                f'{alone / step:.1f}× | {100 * alone / step / cards:.0f} % |'
            )
    return '\n'.join(lines)


if __name__ == '__main__':
    with guarded():
        print(table())
