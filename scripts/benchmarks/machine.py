"""What a figure needs beside it: the processor, the memory, the versions and the day."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import linvision


def machine(threads: int) -> dict[str, Any]:
    """This machine."""
    cpu = [
        line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line
    ]
    packages = {name: installed(name) for name in ('torch', 'timm', 'linformer', 'linformer-pytorch')}
    return {
        'cpu': cpu[0] if cpu else platform.machine(),
        'cores': len(os.sched_getaffinity(0)),
        'threads': threads,
        'amx': 'amx_bf16' in Path('/proc/cpuinfo').read_text(),
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
        'versions': {'python': platform.python_version(), 'linvision': linvision.__version__, **packages},
        'date': str(date.today()),
    }


def installed(package: str) -> str:
    """The version of a package, or 'not installed'."""
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'
