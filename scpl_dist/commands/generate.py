"""``scpl-dist generate``: a language model that a run has saved goes on with a text.

    text so far --> block 0 --> block 1 --> ... --> last block --> scores --> drawn --> one token more
                      '-- sure enough of the next token? --> drawn

Each token is drawn after a pass over the last tokens of the text, at most as many as in a training sequence. Nothing is
kept from pass to pass: a token that leaves early saves the blocks behind for all positions, and what the next one sees
is exactly what a pass without exits computes up to its own block. So ``evaluate`` with the same threshold measures how
good these tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from scpl_dist.commands import saved
from scpl_dist.commands.answers import check_threshold
from scpl_dist.data.preprocessing import restore
from scpl_dist.data.tokens import Tokens
from scpl_dist.storage.run_folder import RunFolder


class Generation:
    """The continuation of a text, made while it is iterated over: pieces of text.

    ValueError: no language model, or arguments that it cannot use.
    """

    def __init__(
        self,
        run_dir: Path,
        prompt: str,
        tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        exit_threshold: float | None = None,
        checkpoint: str | None = None,
    ) -> None:
        _check(tokens, temperature, top_k, exit_threshold)
        RunFolder(run_dir).check()
        self._tokens = _tokens_of(run_dir)
        unknown = self._tokens.unknown(prompt)
        if not prompt or unknown:
            problem = f"the run has no token for {unknown!r}" if unknown else "is empty"
            raise ValueError(f"--prompt {prompt!r}: {problem}; give characters that its training texts have")
        found = saved.find(run_dir, checkpoint)
        plan, self._device, self._trainables = found.plan, found.device, found.blocks()
        self._method = plan.method
        torch.set_num_threads(
            plan.config.runtime.threads
        )  # as in the run: many small steps gain nothing by more
        self._text = self._tokens.encode(prompt).tolist()
        self._number, self._temperature, self._top_k = tokens, temperature, top_k
        self._threshold = exit_threshold
        self._generator = torch.Generator().manual_seed(seed)
        self.blocks = len(self._trainables)
        self.depths: list[int] = []
        """Of each token, the blocks that it has passed."""
        if exit_threshold is not None and self._exits() == 1:
            raise ValueError(
                f"--exit-threshold {exit_threshold}: no block before the last one can answer with run.method = "
                f"{plan.method.name!r}; train with early_exit, or with scpl and loss.local_predictors = true"
            )

    @property
    def mean_depth(self) -> float:
        return sum(self.depths) / max(1, len(self.depths))

    def __iter__(self) -> Iterator[str]:
        shown = len(self._tokens.decode(self._text))
        for _ in range(self._number):
            scores, depth = self._next()
            self.depths.append(depth)
            token = self._draw(scores)
            if token == self._tokens.end:
                return
            self._text.append(token)
            text = self._tokens.decode(self._text)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # it may be half a character as yet
                yield text[shown:]
                shown = len(text)

    def _passes(self) -> Iterator[tuple[int, Tensor]]:
        """By block that can answer, its scores ``(classes,)`` of the next token; the blocks behind run when asked."""
        seen = torch.tensor([self._text[-self._tokens.length :]], device=self._device)
        carry = self._method.carry(seen, seen)
        for index, trainable in self._trainables.items():
            carry = trainable(carry)
            if self._threshold is not None or index == self.blocks - 1:
                scores = self._method.scores(self._trainables, index, carry)
                if scores is not None:
                    yield index, scores[0, -1]

    @torch.no_grad()
    def _exits(self) -> int:
        return sum(1 for _ in self._passes())

    @torch.no_grad()
    def _next(self) -> tuple[Tensor, int]:
        """Scores of the next token, on the CPU, and the number of blocks that they took."""
        for index, scores in self._passes():
            sure = self._method.probabilities(scores).amax()
            if index == self.blocks - 1 or (self._threshold is not None and sure >= self._threshold):
                return scores.float().cpu(), index + 1
        raise AssertionError("the last block answers always")

    def _draw(self, scores: Tensor) -> int:
        scores = scores.clone()
        scores[[token for token in self._tokens.silent if token != self._tokens.end]] = -torch.inf
        if self._temperature == 0:
            return int(scores.argmax())
        if self._top_k is not None and self._top_k < len(scores):
            scores[scores < scores.topk(self._top_k).values[-1]] = -torch.inf
        chances = (scores / self._temperature).softmax(0)
        return int(torch.multinomial(chances, 1, generator=self._generator))


def _check(tokens: int, temperature: float, top_k: int | None, exit_threshold: float | None) -> None:
    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: give at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"--temperature {temperature}: give 0 for the likeliest token, 1 for the model's own chances, or a number "
            "between or above"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"--top-k {top_k}: give at least 1")
    check_threshold(exit_threshold)


def _tokens_of(run_dir: Path) -> Tokens:
    folder = RunFolder(run_dir)
    kept = folder.preprocessing()
    found = restore(kept, folder.tokenizer) if kept is not None and "kind" in kept else None
    if not isinstance(found, Tokens):
        raise ValueError(
            f'{run_dir}: is no run of a language model that has kept its tokens; train one with task.name = "lm" and '
            'data.name = "text_lm"'
        )
    return found
