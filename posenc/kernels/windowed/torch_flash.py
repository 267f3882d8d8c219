"""The backend ``torch_flash``: windowed calls of torch's own CUDA flash kernel, without any other library.

``aten::_flash_attention_forward`` takes a window and returns the logsumexp, which
``scaled_dot_product_attention`` does not (schema of torch 2.11 to 2.13).

Shape letters: B batch, H heads, R queries and K keys of one call, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posenc.kernels.windowed.backend import OutLse, WindowedBackend

OLDEST = (8, 0)
"""Least compute capability of the kernel: Ampere."""


def forward(*arguments: Any, **options: Any) -> Any:
    """The operator, looked up when it is called."""
    return torch.ops.aten._flash_attention_forward(*arguments, **options)


class TorchFlashBackend(WindowedBackend):
    """One call of the flash kernel per band, which serves grouped heads itself."""

    name = "torch_flash"
    summary = "torch's own CUDA flash kernel on windows, merged by logsumexp"
    priority = 15

    def unavailable(self, q_BHLD: Tensor) -> str | None:
        """Also where torch was built without the kernel, or the GPU is too old for it."""
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no flash attention"
        capability = torch.cuda.get_device_capability(q_BHLD.device)
        if capability < OLDEST:
            return f"flash attention needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
        return None

    def window(
        self, q_BRHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, *, left: int | None, right: int | None, scale: float
    ) -> OutLse:
        q_len, k_len = q_BRHD.shape[1], k_BKHD.shape[1]
        out, lse, *_ = forward(
            q_BRHD,
            k_BKHD,
            v_BKHD,
            None,  # cum_seq_q
            None,  # cum_seq_k
            q_len,
            k_len,
            0.0,  # dropout_p
            right == 0,  # is_causal
            False,  # return_debug_mask
            scale=scale,
            window_size_left=-1 if left is None else left,
            window_size_right=-1 if right is None else right,
        )
        return out, lse
