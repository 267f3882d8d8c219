"""The class behind ``--model posenc``: the harness's own transformers model, with a strategy applied.

Only the harness imports this module; it needs lm-evaluation-harness.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from posenc.errors import InvalidConfigError, InvalidInputError
from posenc.evaluate.harness import DEFAULT_WINDOWS, split_arguments
from posenc.evaluate.models import locate
from posenc.hf.apply import apply
from posenc.hf.model_files import damage


class PosencLM(HFLM):  # type: ignore[misc]  # the harness is not typed
    """A transformers model under a strategy.

    Parameters
    ----------
    pretrained : str
        ``tiny``, ``smollm2``, a folder, or a name on the hub.
    strategy, frequencies : str, optional
        By name; parameters of the strategy are further arguments.
    config : str, optional
        A YAML file instead, for settings that no argument can hold.
    attention_backend : str, optional
        posenc's backend; ``backend`` is the harness's own argument.
    max_length : int, optional
        Longest input in tokens; longer ones are cut at their start. The default is sixteen windows; the harness
        itself would cut at one.
    **arguments
        The strategy's parameters, and everything that the type ``hf`` takes.

    Raises
    ------
    InvalidConfigError
        If the strategy is wrong, or batches are asked for where they are not exact.
    InvalidInputError
        If there is no such model, or its files are damaged.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        strategy: str | None = None,
        frequencies: str | None = None,
        config: str | None = None,
        attention_backend: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        **arguments: Any,
    ) -> None:
        chosen, rest = split_arguments(
            arguments, strategy=strategy, frequencies=frequencies, config=config, backend=attention_backend
        )
        folder = locate(str(pretrained))
        try:
            super().__init__(folder, batch_size=batch_size, max_length=max_length, **rest)
        except Exception as error:
            if (reason := damage(folder)) is None:
                raise
            raise InvalidInputError(f"{pretrained}: {reason}") from error
        self.posenc_handle = apply(self.model, chosen)
        applied = self.posenc_handle.strategy
        if str(batch_size) != "1" and applied.follows_prompt:
            raise InvalidConfigError(
                f"batch_size: {applied.name} depends on the prompt's length, and the harness pads batches without "
                "telling the model which tokens are padding. Use batch_size=1."
            )
        if max_length is None and applied.window is not None:
            self._max_length = DEFAULT_WINDOWS * applied.window
