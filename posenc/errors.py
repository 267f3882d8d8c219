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
    """posenc cannot serve this model exactly, for the reason given."""


class ModelBusyError(PosencError):
    """A strategy was to be applied to or removed from a model while it runs elsewhere."""


class BackendError(PosencError):
    """An attention backend cannot run the case it was asked for."""


class PluginError(PosencError):
    """A plugin broke its contract or two plugins claim one name."""


class CacheMismatchError(PosencError):
    """A KV cache was filled by something other than the plan that now reads it."""
