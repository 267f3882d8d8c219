"""One entry of a suite's ``strategies``: a configuration, or parameters by length out of a calibration file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posenc.calibration.file import check_same_model, read
from posenc.config import Config, read_config
from posenc.errors import InvalidConfigError
from posenc.params import Fingerprint

LABEL, AGAINST, CALIBRATED, TRANSFERRED = "label", "against", "calibrated", "transferred_from"


class StrategyEntry:
    """An entry that is checked.

    Parameters
    ----------
    entry : str or dict
        As the suite has it: a strategy's name, or a configuration with an optional ``label`` and ``against`` (the label
        that the report compares it with). Instead of ``strategy``, ``calibrated: NAME`` takes what was chosen for
        the model itself; with ``transferred_from: FILE`` what was chosen for another one.
    calibration : str, optional
        The suite's calibration file.
    model : callable
        Returns the fingerprint of the suite's model.
    where : str
        Begins every message.

    Raises
    ------
    InvalidConfigError
        If a key is wrong, or the calibration file does not belong to the model that the entry says.
    """

    def __init__(self, entry: Any, calibration: str | None, model: Callable[[], Fingerprint], where: str) -> None:
        if not isinstance(entry, dict):
            entry = {"strategy": entry}
        given = {key: value for key, value in entry.items() if key not in (LABEL, AGAINST, CALIBRATED, TRANSFERRED)}
        self.transferred = TRANSFERRED in entry
        self._by_length: dict[int, dict[str, Any]] | None = None
        if CALIBRATED in entry:
            if "strategy" in given:
                raise InvalidConfigError(f"{where}: give either 'strategy' or 'calibrated'.")
            file = entry.get(TRANSFERRED, calibration)
            if file is None:
                raise InvalidConfigError(f"{where}: 'calibrated' needs the suite's key 'calibration', a file.")
            self._by_length = _chosen(_text(file, f"{where}.{TRANSFERRED}"), entry, model(), where)
            given["strategy"] = {"name": entry[CALIBRATED]}
        elif self.transferred:
            raise InvalidConfigError(f"{where}: 'transferred_from' belongs to 'calibrated: NAME'.")
        self._given, self._where = given, where
        self.label: str = _text(entry[LABEL], f"{where}.{LABEL}") if LABEL in entry else self._config(given).label
        self.against: str | None = _text(entry[AGAINST], f"{where}.{AGAINST}") if AGAINST in entry else None

    def config(self, length: int) -> Config:
        """The configuration for inputs of a length: the parameters of the next calibrated length, else the longest."""
        given = self._given
        if self._by_length is not None:
            reached = [at for at in self._by_length if at >= length]
            params = self._by_length[min(reached) if reached else max(self._by_length)]
            given = {**given, "strategy": {**given["strategy"], **params}}
        return self._config(given)

    def _config(self, given: dict[str, Any]) -> Config:
        return read_config(given, source=self._where)


def _chosen(file: str, entry: dict[str, Any], model: Fingerprint, where: str) -> dict[int, dict[str, Any]]:
    """Parameters by length that ``posenc calibrate`` chose for a strategy."""
    try:
        calibration = read(file)
    except InvalidConfigError as error:
        raise InvalidConfigError(f"{where}: {error}") from None
    measured = calibration.model.fingerprint
    if TRANSFERRED not in entry:
        try:
            check_same_model(measured, model, source=file)
        except InvalidConfigError as error:
            raise InvalidConfigError(
                f"{where}: {error} To see what they do here all the same, say 'transferred_from: {file}' in the entry."
            ) from None
    elif measured == model:
        raise InvalidConfigError(
            f"{where}: {file} was measured on this very model. Name it in the suite's key 'calibration' and leave "
            "'transferred_from' out."
        )
    name = entry[CALIBRATED]
    if name not in calibration.strategies:
        raise InvalidConfigError(f"{where}: {file} has no {name!r}. It has: {', '.join(calibration.strategies)}.")
    return {length: choice.params for length, choice in calibration.strategies[name].items()}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidConfigError(f"{where}: must be a text, got {value!r}.")
    return value
