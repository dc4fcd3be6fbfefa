"""Early exit: every block learns from a classifier of its own, and its gradient ends at the block's input.

This is what the papers on SCPL compare with (also known as DGL, or "pred" of arXiv 1901.06656). It is not BranchyNet,
which sums the losses of all exits and sends their gradients through the whole network. The last block has the final
predictor too, on its detached output. Accuracy is that of the final predictor; leaving early is a choice at inference,
``evaluate --exit-threshold``.
"""

from __future__ import annotations

from scpl_dist.methods.scpl import Scpl


class EarlyExit(Scpl):
    """Isolated local classifiers: see the module. A mean over samples, so a batch may be split."""

    name = "early_exit"
    whole = ""

    @property
    def objective(self) -> str:
        """Always the local cross-entropy."""
        return "ce"
