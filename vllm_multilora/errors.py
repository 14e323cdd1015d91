"""Exceptions of this package; each message says what was found, what was expected, what to do."""


class MultiLoRAError(Exception):
    """Base class of all errors that vllm-multilora raises on purpose."""


class ConfigError(MultiLoRAError, ValueError):
    """A setting has a wrong name, type or value."""
