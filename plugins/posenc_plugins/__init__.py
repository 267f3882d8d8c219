"""The built-in strategies, one file per paper, registered in the same way as those of a third party."""

from __future__ import annotations

from collections.abc import Callable

from posenc.hookspecs import hookimpl
from posenc.positions import PositionStrategy
from posenc_plugins.auto import Auto
from posenc_plugins.dca import DualChunkAttention
from posenc_plugins.dpe import DimensionWisePositions
from posenc_plugins.dynamic import DynamicNTK
from posenc_plugins.lampe import Lampe
from posenc_plugins.linear import LinearScaling
from posenc_plugins.llama3 import Llama3Scaling
from posenc_plugins.lm_infinite import LMInfinite
from posenc_plugins.longrope import LongRoPE
from posenc_plugins.ntk import NTKScaling
from posenc_plugins.rerope import LeakyReRoPE, ReRoPE
from posenc_plugins.rope import PlainRoPE
from posenc_plugins.self_extend import SelfExtend
from posenc_plugins.streaming_llm import StreamingLLM
from posenc_plugins.string import ShiftedRoPE
from posenc_plugins.yarn import YaRN

STRATEGIES: tuple[type[PositionStrategy], ...] = (
    PlainRoPE,
    Lampe,
    SelfExtend,
    ReRoPE,
    LeakyReRoPE,
    DualChunkAttention,
    ShiftedRoPE,
    LMInfinite,
    StreamingLLM,
    DimensionWisePositions,
    LinearScaling,
    DynamicNTK,
    NTKScaling,
    YaRN,
    Llama3Scaling,
    LongRoPE,
    Auto,
)


@hookimpl
def posenc_register_strategies(register: Callable[[type[PositionStrategy]], None]) -> None:
    """Register every built-in strategy."""
    for strategy in STRATEGIES:
        register(strategy)
