"""Seconds, peak memory, energy and kernels of a function on a device: what `gpu_report.py` measures with."""

import math
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MOST_CALLS = 50  # between two looks at the clock


class Meter:
    """Measures on a device, up to a deadline.

    Args:
        device: The device.
        deadline: When no further measurement starts, on the clock of `time.monotonic`.
        least_s: What is timed together takes as long at least: single launches cannot be timed.
        energy_s: For as long energy is measured.
    """

    def __init__(self, device: torch.device, deadline: float, least_s: float = 0.2, energy_s: float = 3.0) -> None:
        self.device, self.deadline, self.cuda = device, deadline, device.type == 'cuda'
        self.least_s, self.energy_s = least_s, energy_s

    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.deadline

    def timed(self, function: Callable[[], Any], calls: int = 1) -> dict[str, float]:
        """Seconds a call, and the peak of memory above what was held before."""
        base = 0
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            base = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        seconds = (time.perf_counter() - start) / calls
        peak = torch.cuda.max_memory_allocated(self.device) - base if self.cuda else 0
        return {'seconds': seconds, 'peak_gib': peak / 2**30}

    def measured(self, function: Callable[[], Any], repeats: int) -> dict[str, Any]:
        """{'first_s': with what is done once, 'steps': […]} of a function."""
        first_s = self.timed(function)['seconds']
        again = self.timed(function)
        calls = min(MOST_CALLS, max(1, math.ceil(self.least_s / again['seconds'])))
        steps = [again] if self.late() else []
        while len(steps) < repeats and not self.late():
            steps.append(self.timed(function, calls))
        return {'first_s': first_s, 'steps': steps}

    def energy(self, function: Callable[[], Any]) -> dict[str, Any]:
        """{'joules': a call, 'energy_from': what counted them}, over `energy_s` at least; or why there is none."""
        counter = Joules.of(self.device)
        if counter is None:
            return {'no_energy': 'neither NVML nor nvidia-smi says what this device uses'}
        self.timed(function)
        before, start, calls = counter.read(), time.perf_counter(), 0
        while time.perf_counter() - start < self.energy_s:
            self.timed(function, MOST_CALLS if calls > 10 else 1)
            calls += MOST_CALLS if calls > 10 else 1
        return {'joules': (counter.read() - before) / calls, 'energy_from': counter.source, 'energy_calls': calls}

    def kernels(self, function: Callable[[], Any], most: int = 8) -> dict[str, Any]:
        """Which attention ran, by PyTorch's own record; how many kernels; and those that took longest, in ms."""
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.cuda]
        with profile(activities=activities, acc_events=True) as profiler:  # else torch 2.11 warns
            self.timed(function)
        events = profiler.events() or []
        attention = Counter(e.name for e in events if '_scaled_dot_product_' in e.name)
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        ms: Counter[str] = Counter()
        for event in on_device:
            ms[event.name[:100]] += event.time_range.elapsed_us() / 1000
        return {
            'attention_ran': dict(attention) or 'written out',
            'attention_kernels': sorted(
                n for n in ms if any(w in n.lower() for w in ('flash', 'fmha', 'sdpa', 'attn'))
            ),
            'kernels': len(on_device),
            'kernels_ms': sum(ms.values()),
            'longest_ms': dict(ms.most_common(most)),
        }


class Joules:
    """What a GPU has used, in joules.

    Args:
        read: Gives it.
        source: Whose figure that is.
    """

    def __init__(self, read: Callable[[], float], source: str) -> None:
        self.read, self.source = read, source

    @classmethod
    def of(cls, device: torch.device) -> 'Joules | None':
        """By NVML's counter, else by nvidia-smi's watts times seconds, or None."""
        if device.type != 'cuda':
            return None
        index = device.index or 0
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            return cls(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000, 'NVML')
        except Exception:  # not installed, not permitted, not supported
            pass
        ask = ['nvidia-smi', f'--id={index}', '--query-gpu=power.draw', '--format=csv,noheader,nounits']
        last, total = time.perf_counter(), 0.0

        def read() -> float:  # the watts of now, for all the time since it was last read
            nonlocal last, total
            watts, now = (
                float(subprocess.run(ask, capture_output=True, text=True, check=True).stdout),
                time.perf_counter(),
            )
            total, last = total + watts * (now - last), now
            return total

        try:
            read()
        except (OSError, ValueError, subprocess.CalledProcessError):
            return None
        return cls(read, 'nvidia-smi')
