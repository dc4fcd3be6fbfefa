"""Models as lists of blocks: found by name, built block by block, traced for the shapes between them.

A block is an ``nn.Module`` that takes one pytree of tensors, batch first, and returns one. It may say, with plain
attributes, how heads read its output (see `scpl_dist.methods.heads`), and what its weights are called in the network
that it was cut from (see `scpl_dist.models.weights`); the predictor is no block.

A name means a *model function* ``(classes, **model.args) -> list`` of blocks, or of functions without arguments that
build one each: then a worker builds only the blocks that it holds. The package has ``vgg_tiny`` and ``gpt``; installed
packages add theirs as entry points in the group ``scpl_dist.models``, as ``recipes/`` does. A name that ends with a
colon is a family: its entry point makes a model function of what follows the colon.

    [project.entry-points."scpl_dist.models"]
    vgg8 = "scpl_dist_recipes.vgg8:vgg8"
    "torchvision:" = "scpl_dist_recipes.torchvision:model_function"

``model.args`` of a built-in or installed function are checked against the types that it declares, so they need to
exist when it runs; a family checks its own.
"""

from __future__ import annotations

from scpl_dist.models.build import MODELS, build, fitted, outline, resolve
from scpl_dist.models.trace import spec, trace
from scpl_dist.models.vgg import vgg_blocks

__all__ = ["MODELS", "build", "fitted", "outline", "resolve", "spec", "trace", "vgg_blocks"]
