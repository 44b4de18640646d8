"""Which arithmetic trains this model fastest on this machine: measured, not assumed."""

import copy
import time

import torch
from torch import Tensor, nn

from linvision.train.parallel import Processes

CLEAR = 3.0  # times as fast: what one image is enough to show
LONG = 10.0  # seconds of repetitions that are enough
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision; switched off for fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != 'fp32')


def probe_precision(model: nn.Module, images: Tensor, steps: int = 5) -> dict[str, float]:
    """Seconds of one forward and backward pass of a copy of the model, in fp32 and in bf16 autocast.

    One image comes first: where that decides, the batch is spared, which takes minutes in bf16 on a CPU without it.

    Args:
        model: The model; it is copied, not touched.
        images: One training batch.
        steps: Repetitions after a warm-up; the fastest counts. There are fewer where they take long.

    Returns:
        Seconds by precision.
    """
    device = images.device
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # of one image it knows no spread
            module.eval()
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        for part in (images[:1], images):
            seconds: dict[str, list[float]] = {'fp32': [], 'bf16': []}
            began = time.perf_counter()
            for i in range(steps + 1):
                for precision, times in seconds.items():  # in turn, so that both meet the same load
                    start = time.perf_counter()
                    with autocast(device, precision):
                        loss = model(part).float().square().mean()
                    loss.backward()
                    float(loss.detach())  # waits for the device
                    times.append(time.perf_counter() - start)
                fastest = {precision: min(times[1:], default=0.0) for precision, times in seconds.items()}
                clear = max(fastest.values()) > CLEAR * min(fastest.values())
                if clear or i and time.perf_counter() - began > LONG:
                    break
            if clear:
                break
    return fastest


def choose_precision(
    wanted: str, model: nn.Module, images: Tensor, processes: Processes
) -> tuple[str, dict[str, float]]:
    """The precision to train in, and the seconds that decided (none where `wanted` names one).

    bf16 must be at least 5 % faster, since fp32 is the safer choice. Of several processes the slowest counts.
    """
    if wanted != 'auto':
        return wanted, {}
    seconds = probe_precision(model, images)
    seconds = dict(zip(seconds, processes.largest(*seconds.values()), strict=True))
    return ('bf16' if seconds['bf16'] < 0.95 * seconds['fp32'] else 'fp32'), seconds
