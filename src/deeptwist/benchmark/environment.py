"""The machine that a figure was measured on, in one line."""

import os
import platform
from pathlib import Path

import torch


def describe_machine() -> str:
    """Processor or accelerator, thread count and torch version."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{processor}, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
