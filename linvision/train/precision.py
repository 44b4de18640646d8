"""Which arithmetic a run computes in: told, or what the processor or the card is built for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from linvision.autocast import cpu_bf16
from linvision.train.parallel import Processes

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision; switched off for fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != 'fp32')


@contextmanager
def matmul_precision_kept() -> Iterator[None]:
    """Put PyTorch's setting for fp32 products back at the end."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def use_tf32(precision: str, device: torch.device) -> str:
    """Let fp32 products be TF32 where the card has it, from here on in this process; what was done, in words, or ''.

    Of 10 bits of mantissa, as fp16's, with fp32's range and sums: about eight times as fast on an A100.
    """
    if precision != 'fp32' or device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0):
        return ''
    torch.set_float32_matmul_precision('high')
    return f'fp32 products are computed in TF32, which {torch.cuda.get_device_name(device)} has'


def choose_precision(wanted: str, processes: Processes) -> tuple[str, str]:
    """The precision to train in; and why, in words, where `wanted` names none, or one that a processor emulates.

    'auto' is bf16 where the device multiplies in it, else fp32: a processor that lacks it is ten times slower in bf16.
    It depends on the machine alone, so that two runs of a recipe on one machine are in the same precision. Of several
    processes, all must have it.
    """
    has, why = has_bf16(processes.device)
    if wanted == 'bf16' and processes.device.type == 'cpu' and not has:
        return 'fp32', f'{why}: in place of bf16, which it would emulate at a tenth of the speed'
    if wanted != 'auto':
        return wanted, ''
    (lacking,) = processes.largest(float(not has))
    if has and lacking:
        return 'fp32', 'another process of the run has no bf16'
    return ('bf16' if has else 'fp32'), why


def has_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether a device multiplies in bf16, and what says so."""
    if device.type == 'cpu':
        return bool(cpu_bf16()), f'the processor has {cpu_bf16() or "no instructions for bf16"}'
    if device.type == 'cuda':
        name, has = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device) >= (8, 0)
        return has, f'{name} {"computes in" if has else "has no"} bf16'
    return False, f'of {device.type} nothing is known'
