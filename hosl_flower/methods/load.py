"""Finding a method by its name, or by the place of its class."""

import importlib
import inspect

from hosl_flower.config.run_config import RunConfig
from hosl_flower.data.infer_task import completed
from hosl_flower.errors import ConfigError
from hosl_flower.methods.method import Method
from hosl_flower.methods.registry import place_of, registered


def load_method(config: RunConfig) -> Method:
    """The method that a config names, with that config.

    Raises:
        ConfigError: when there is no such method, or it cannot run the config.
    """
    return method_class(config.strategy)(completed(config))


def method_class(reference: str) -> type[Method]:
    """The class of a method.

    Args:
        reference: a registered name such as "ho-sfl", or "module:class".

    Raises:
        ConfigError: when it is not there, or is no method.
    """
    place = place_of(reference)
    module, _, name = place.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"strategy = {reference!r} cannot be loaded ({error}); expected one of "
            f"{', '.join(sorted(registered()))}, or 'module:class' of a package that is installed "
            "where the ServerApp runs"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method)) or inspect.isabstract(cls):
        raise ConfigError(f"strategy = {reference!r} is not a Method with steps")
    return cls
