"""What is done about a loop that the guard notices, in lory's decode loop or in transformers' `generate`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from lory.decoding.guard import Loop, RepetitionGuard, find_loop
from lory.decoding.loop import Verdict
from lory.decoding.processors import LoopEscape
from lory.decoding.words import Words
from lory.runtime import UsageError

Policy = Literal["report", "stop", "penalize", "back_up", "retry"]


class PolicyGuard:
    """Watches the rows of a decode loop (it is a `loop.Watcher`) and acts by a policy; one for each call of the loop.

    Args:
        policy: `report` only notes loops; `stop` ends the answer; `penalize` makes the loop's tokens less likely from
            then on, more so each time; `back_up` returns to the end of the first copy, forbids the token that led into
            the second, and samples for a while (one row at a time); `retry` ends the answer, too, and `outcomes` asks
            the caller for another attempt with a changed prompt.
        prompt_tokens: columns of the ids that are the prompt's.
        substance: see `RepetitionGuard`.
        terminators: tokens that end an answer; what follows in its row is padding.
        limit: how many times an answer is helped before it is stopped.
        seed: for what `back_up` samples.

    Attributes:
        loops: by row, those found, in order, counted from the answer's first token.
        outcomes: by row, why it was ended here: the finish reason.
    """

    def __init__(
        self,
        policy: Policy,
        prompt_tokens: int,
        substance: Words | None = None,
        terminators: Collection[int] = (),
        limit: int = 3,
        seed: int = 0,
    ) -> None:
        self.policy, self.limit, self.seed = policy, limit, seed
        self.loops: dict[int, list[Loop]] = {}
        self.outcomes: dict[int, Literal["repetition", "retry"]] = {}
        self._prompt_tokens = self._seen = prompt_tokens
        self._substance, self._terminators = substance, frozenset(terminators)
        self._guards: list[RepetitionGuard] = []
        self._escape: LoopEscape | None = None
        self._ended: set[int] = set()

    def __call__(self, ids: Tensor, scores: Tensor) -> Verdict | None:
        """Judge (B, T) prompt and answer so far, and the (B, V) processed scores of the next token; None: go on."""
        if not self._guards:
            self._begin(len(ids))
        back = 0
        for row, tokens in enumerate(ids[:, self._seen :].tolist()):
            for token in tokens:
                back = self._take(row, token, ids) or back
        self._seen = ids.shape[1] - back
        if back:
            return Verdict(back=back)
        stop = torch.tensor([row in self.outcomes for row in range(len(ids))], device=ids.device)
        changed = self._escape(ids, scores) if self._escape else scores
        if changed is scores and not self.outcomes:
            return None
        return Verdict(scores=changed, stop=stop)

    def _begin(self, rows: int) -> None:
        if self.policy == "back_up" and rows != 1:
            raise UsageError(
                f"The guard's policy back_up was given for {rows} answers at a time; decode them one by one, "
                "or choose penalize."
            )
        self._guards = [RepetitionGuard(self._substance) for _ in range(rows)]
        if self.policy in ("penalize", "back_up"):
            self._escape = LoopEscape(rows, self.seed)

    def _take(self, row: int, token: int, ids: Tensor) -> int:
        """Feed a row's new token and act on the loop that shows; how many tokens are to be taken back."""
        if row in self._ended:
            return 0
        if token in self._terminators:
            self._ended.add(row)
        if self._escape:
            self._escape.move_on(row)
        loop = self._guards[row].feed(token)
        if loop is None:
            return 0
        loops = self.loops.setdefault(row, [])
        loops.append(loop)
        copy_end = loop.start + loop.period
        answer = ids[row, self._prompt_tokens :].tolist()
        if self.policy == "retry" or (self.policy != "report" and (not self._escape or len(loops) > self.limit)):
            self.outcomes[row] = "retry" if self.policy == "retry" else "repetition"
            self._ended.add(row)
        elif self._escape and self.policy == "penalize":
            self._escape.penalize(row, answer[loop.start : copy_end])
        elif self._escape:
            self._escape.lead_out(row, answer[copy_end])
            self._guards[row].rewind(copy_end)
            return len(answer) - copy_end
        return 0


class RepetitionStop(StoppingCriteria):
    """Ends a row of transformers' `generate` when it loops.

    Args:
        prompt_tokens: columns of `input_ids` that belong to the prompt.
        substance: see `RepetitionGuard`.

    Attributes:
        loops: by row, the loop that ended it.
    """

    def __init__(self, prompt_tokens: int, substance: Words | None = None) -> None:
        self.loops: dict[int, Loop] = {}
        self._seen = prompt_tokens
        self._substance = substance
        self._guards: list[RepetitionGuard] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) whether each row is done; `input_ids` are (B, T)."""
        if not self._guards:
            self._guards = [RepetitionGuard(self._substance) for _ in range(len(input_ids))]
        for row, tokens in enumerate(input_ids[:, self._seen :].tolist()):
            if row not in self.loops and (loop := find_loop(tokens, self._guards[row])):
                self.loops[row] = loop
        self._seen = input_ids.shape[1]
        done = [row in self.loops for row in range(len(input_ids))]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
