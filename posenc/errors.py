"""Every error a user can see. Each message says what, why and what to do."""

from __future__ import annotations


class PosencError(Exception):
    """Base of every error that posenc raises on purpose."""


class InvalidInputError(PosencError, ValueError):
    """A length, tensor or text handed to posenc cannot be used."""


class InvalidConfigError(PosencError, ValueError):
    """A configuration value is wrong; the message names its key path."""


class UnknownNameError(PosencError, LookupError):
    """No plugin of that name is installed."""


class UnsupportedModelError(PosencError):
    """posenc cannot serve this model exactly; the message gives the reason."""


class ModelBusyError(PosencError):
    """A strategy cannot be applied to or removed from a model that is running elsewhere."""


class BackendError(PosencError):
    """An attention backend cannot run the requested case."""


class PluginError(PosencError):
    """A plugin broke its contract, or two plugins claim the same name."""


class CacheMismatchError(PosencError):
    """A KV cache was filled by something other than the plan that now reads it."""
