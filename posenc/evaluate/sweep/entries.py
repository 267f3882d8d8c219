"""One entry of a suite's ``strategies``: a configuration, or parameters by length from a calibration file."""

from __future__ import annotations

from typing import Any

from posenc.calibration.file import check_same_model, read
from posenc.config import Config, read_config
from posenc.errors import InvalidConfigError
from posenc.params import Fingerprint

LABEL, AGAINST, CALIBRATED, TRANSFERRED = "label", "against", "calibrated", "transferred_from"


class StrategyEntry:
    """A checked entry.

    Parameters
    ----------
    entry : str or dict
        As it stands in the suite: a strategy's name, or a configuration with an optional ``label`` and ``against`` (the
        label that the report compares it with). Instead of ``strategy``, ``calibrated: NAME`` takes what was chosen
        for the model itself; with ``transferred_from: FILE`` what was chosen for another one.
    calibration : str, optional
        The suite's calibration file.
    model : Fingerprint
        Of the suite's model.
    where : str
        Begins every message.

    Raises
    ------
    InvalidConfigError
        If a key is wrong, or the calibration file does not belong to the model that the entry says.
    """

    def __init__(self, entry: Any, calibration: str | None, model: Fingerprint, where: str) -> None:
        if not isinstance(entry, dict):
            entry = {"strategy": entry}
        config = {key: value for key, value in entry.items() if key not in (LABEL, AGAINST, CALIBRATED, TRANSFERRED)}
        self.transferred = TRANSFERRED in entry
        self._by_length: dict[int, dict[str, Any]] | None = None
        if CALIBRATED in entry:
            if "strategy" in config:
                raise InvalidConfigError(f"{where}: give either 'strategy' or 'calibrated'.")
            file = entry.get(TRANSFERRED, calibration)
            if file is None:
                raise InvalidConfigError(f"{where}: 'calibrated' needs the suite's key 'calibration', a file.")
            self._by_length = _calibrated(_text(file, f"{where}.{TRANSFERRED}"), entry, model, where)
            config["strategy"] = {"name": entry[CALIBRATED]}
        elif self.transferred:
            raise InvalidConfigError(f"{where}: 'transferred_from' belongs to 'calibrated: NAME'.")
        self._config, self._where = config, where
        self.label: str = _text(entry[LABEL], f"{where}.{LABEL}") if LABEL in entry else self._read(config).label
        self.against: str | None = _text(entry[AGAINST], f"{where}.{AGAINST}") if AGAINST in entry else None

    def config(self, length: int) -> Config:
        """The configuration for inputs of a length.

        Calibrated parameters are those of the next calibrated length that is no shorter, else of the longest.
        """
        if self._by_length is None:
            return self._read(self._config)
        lengths = [calibrated for calibrated in self._by_length if calibrated >= length]
        params = self._by_length[min(lengths) if lengths else max(self._by_length)]
        return self._read({**self._config, "strategy": {**self._config["strategy"], **params}})

    def _read(self, config: dict[str, Any]) -> Config:
        return read_config(config, source=self._where)


def _calibrated(file: str, entry: dict[str, Any], model: Fingerprint, where: str) -> dict[int, dict[str, Any]]:
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
                f"{where}: {error} To measure these parameters here all the same, say 'transferred_from: {file}' in "
                "the entry."
            ) from None
    elif measured == model:
        raise InvalidConfigError(
            f"{where}: {file} was measured on this very model. Name it in the suite's key 'calibration' and remove "
            "'transferred_from'."
        )
    name = entry[CALIBRATED]
    if name not in calibration.strategies:
        raise InvalidConfigError(f"{where}: {file} has no {name!r}. It has: {', '.join(calibration.strategies)}.")
    return {length: choice.params for length, choice in calibration.strategies[name].items()}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidConfigError(f"{where}: must be a text, got {value!r}.")
    return value
