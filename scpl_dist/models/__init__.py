"""Models as lists of blocks: found by name, built block by block, traced for the shapes between them.

A block is an ``nn.Module`` that takes one pytree of tensors, batch first, and returns one. The predictor is
no block (see `scpl_dist.methods.heads`).
"""

from __future__ import annotations

from scpl_dist.models.build import argument, build, names, outline, resolve
from scpl_dist.models.trace import spec, trace

__all__ = ["argument", "build", "names", "outline", "resolve", "spec", "trace"]
