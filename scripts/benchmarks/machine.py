"""What a figure needs beside it: the processor, the memory, the versions and the day."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import linvision
from linvision.installed_memory import installed_gib


def machine(threads: int) -> dict[str, Any]:
    """This machine."""
    about = Path('/proc/cpuinfo').read_text()
    cpu = [line.split(':')[1].strip() for line in about.splitlines() if 'model name' in line]
    packages = {name: installed(name) for name in ('torch', 'timm', 'linformer', 'linformer-pytorch')}
    return {
        'cpu': cpu[0] if cpu else platform.machine(),
        'cores': len(os.sched_getaffinity(0)),
        'threads': threads,
        'amx': 'amx_bf16' in about,
        'memory_gib': round(installed_gib(), 1),
        'versions': {'python': platform.python_version(), 'linvision': linvision.__version__, **packages},
        'date': str(date.today()),
    }


def installed(package: str) -> str:
    """The version of a package, or 'not installed'."""
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'
