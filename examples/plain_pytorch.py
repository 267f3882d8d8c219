"""A decoder in plain PyTorch, without transformers, that reads past its window through ``posenc.attention``.

Your own model has to cache unrotated keys, and to pass raw queries and keys with a plan to ``posenc.attention``.
One plan covers the prompt and all tokens to come; ``plan.prefix`` is its part for the tokens so far.

    python examples/plain_pytorch.py

Shape letters: B batch, H heads, L tokens, C hidden channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import posenc

HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY, WINDOW = 4, 2, 16, 100, 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = HEADS * HEAD_DIM
        self.query = nn.Linear(hidden, HEADS * HEAD_DIM, bias=False)
        self.key = nn.Linear(hidden, KEY_HEADS * HEAD_DIM, bias=False)
        self.value = nn.Linear(hidden, KEY_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BLC: Tensor, cache: list[Tensor], plan: posenc.PositionPlan, rotary: posenc.Rotary) -> Tensor:
        made = (layer(x_BLC) for layer in (self.query, self.key, self.value))
        q, k, v = (x_BLC.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x_BLC in made)
        if cache:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
        cache[:] = [k, v]  # raw keys: another plan may place them elsewhere
        return self.out(posenc.attention(q, k, v, plan.prefix(k.shape[2]), rotary).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        hidden = HEADS * HEAD_DIM
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        self.rotary = posenc.Rotary.from_theta(10_000, HEAD_DIM)

    def forward(self, tokens_BL: Tensor, caches: list[list[Tensor]], plan: posenc.PositionPlan) -> Tensor:
        x_BLC = self.embed(tokens_BL)
        for layer, norm, cache in zip(self.layers, self.norms, caches, strict=True):
            x_BLC = x_BLC + layer(norm(x_BLC), cache, plan, self.rotary)
        return self.head(x_BLC)

    @torch.no_grad()
    def generate(self, tokens_BL: Tensor, new: int, strategy: posenc.PositionStrategy) -> Tensor:
        """Return the tokens that greedy decoding generates after the prompt."""
        plan = strategy.plan(tokens_BL.shape[1], tokens_BL.shape[1] + new)
        caches: list[list[Tensor]] = [[] for _ in self.layers]
        step_BL, found = tokens_BL, []
        for _ in range(new):
            step_BL = self(step_BL, caches, plan)[:, -1:].argmax(-1)
            found.append(step_BL)
        return torch.cat(found, 1)


if __name__ == "__main__":
    torch.manual_seed(0)
    prompt = torch.randint(VOCABULARY, (1, 4 * WINDOW))
    print(Decoder().generate(prompt, 8, posenc.strategy("rerope", window=WINDOW, window_size=8)).tolist())
