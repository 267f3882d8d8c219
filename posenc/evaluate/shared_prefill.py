"""Answer several prompts that begin alike, and read their common beginning once.

Prompts of one length may differ, for example, only in the question at their end, or only after the place where a
needle is hidden. Each prompt is read from the first token that differs from the prompt before; the keys of earlier
tokens do not depend on later ones. Every forward is told the final prompt length, so the plan is that of the whole
prompt.

Shape letters: P prompt tokens, K kept positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.errors import InvalidInputError
from posenc.evaluate.models import end_tokens
from posenc.hf.handle import Handle
from posenc.hf.transformers_names import cache_argument, can_be_cropped, output_cache


class SharedPrefill:
    """One cache that moves from prompt to prompt.

    Parameters
    ----------
    model
        A causal language model.
    handle : Handle
        The handle of the strategy that is applied to it.
    """

    def __init__(self, model: Any, handle: Handle) -> None:
        self._model, self._handle = model, handle
        self._cache: Any = None
        self._prompt = np.empty(0, dtype=np.int64)
        self.tokens_read = 0

    @torch.no_grad()
    def read(self, prompt_P: NDArray[np.int64], keep: int = 1) -> Tensor:
        """Logits of the last `keep` positions of a prompt.

        Parameters
        ----------
        prompt_P : int64 [P]
            The whole prompt.
        keep : int
            ``1 <= keep <= P``.

        Returns
        -------
        Tensor
            float32 [K, V].

        Raises
        ------
        InvalidInputError
            If the prompt has no `keep` tokens.
        """
        if not 1 <= keep <= len(prompt_P):
            raise InvalidInputError(f"keep: must lie between 1 and the prompt's {len(prompt_P)} tokens, got {keep}.")
        start = self._rewind(prompt_P, keep)
        tokens = torch.from_numpy(prompt_P[start:].copy())[None].to(self._model.device)
        with self._handle.prompt_length(len(prompt_P)):
            out = self._model(
                input_ids=tokens, **cache_argument(self._model, self._cache), use_cache=True, logits_to_keep=keep
            )
        self._cache, self._prompt = output_cache(out), prompt_P
        self.tokens_read += tokens.shape[1]
        logits_KV: Tensor = out.logits[0].float()
        return logits_KV

    @torch.no_grad()
    def answer(self, prompt_P: NDArray[np.int64], new_tokens: int) -> list[int]:
        """Up to `new_tokens` tokens, decoded greedily, without the end-of-text token."""
        answer: list[int] = []
        ends = end_tokens(self._model)
        logits = self.read(prompt_P)
        while True:
            token = int(logits[-1].argmax())
            if token in ends:
                return answer
            answer.append(token)
            if len(answer) == new_tokens:
                return answer
            step = torch.tensor([[token]], device=self._model.device)
            logits = self._model(input_ids=step, **cache_argument(self._model, self._cache), use_cache=True).logits[0]

    def _rewind(self, prompt_P: NDArray[np.int64], keep: int) -> int:
        """Cut the cache back to what the prompt shares with the last one, and return how many tokens remain."""
        shared = 0
        if self._cache is not None and len(prompt_P) == len(self._prompt) and can_be_cropped(self._cache):
            differs = np.flatnonzero(prompt_P != self._prompt)
            shared = min(int(differs[0]) if len(differs) else len(prompt_P), len(prompt_P) - keep)
        if shared:
            surplus = self._cache.get_seq_length() - shared  # the answer's tokens included
            if surplus:
                self._cache.crop(-surplus)
        else:
            self._cache = None
        return shared
