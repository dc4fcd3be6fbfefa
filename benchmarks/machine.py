"""What a benchmark ran on, for the first line of its output."""

from __future__ import annotations

import os
import platform

import torch


def described() -> str:
    """Processor, cores, load and torch, such as "AMD EPYC, 2 cores, load 0.4, torch 2.14.1"."""
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    load = os.getloadavg()[0]
    return f"{cpu}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}"
