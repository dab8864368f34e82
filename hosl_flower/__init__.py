"""Split federated fine-tuning on Flower: zeroth-order clients, first-order server.

Everything that is imported from here is public, and nothing else is. Names are loaded when they
are asked for, since a SuperNode's first process and the command line start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    # a run
    "RunConfig": "config.run_config",
    "parse_config": "config.parse",
    "Method": "methods.method",
    "load_method": "methods.load",
    "run_in_process": "run.start",
    # on Flower
    "SplitStrategy": "flower.strategy",
    # the parts of a method
    "Session": "server.session",
    "Cohort": "server.cohort",
    "Link": "server.link",
    "Entry": "ledger.ledger",
    "Ledger": "ledger.ledger",
    "Layout": "zo.directions",
    "estimate": "zo.estimator",
    "perturbed": "zo.perturbed",
    # the halves of a model
    "Lora": "models.lora",
    "open_base": "models.base_model",
    "load_client": "models.split",
    "load_server": "models.split",
    "trainable_parameters": "models.submodels",
    "ClientState": "ledger.client_state",
    # a finished run
    "read_run": "export.finished_run",
    "open_trained": "export.trained_model",
    "export_run": "export.export",
    "continuation": "export.generate",
    # errors
    "CheckpointError": "errors",
    "ClientError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DivergedError": "errors",
    "DriftError": "errors",
    "HoslError": "errors",
    "ModelError": "errors",
    "ProtocolError": "errors",
}
__all__ = ["__version__", *_WHERE]  # a list of names


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:  # the same names, for type checkers
    from hosl_flower.config.parse import parse_config as parse_config
    from hosl_flower.config.run_config import RunConfig as RunConfig
    from hosl_flower.errors import CheckpointError as CheckpointError
    from hosl_flower.errors import ClientError as ClientError
    from hosl_flower.errors import ConfigError as ConfigError
    from hosl_flower.errors import DataError as DataError
    from hosl_flower.errors import DivergedError as DivergedError
    from hosl_flower.errors import DriftError as DriftError
    from hosl_flower.errors import HoslError as HoslError
    from hosl_flower.errors import ModelError as ModelError
    from hosl_flower.errors import ProtocolError as ProtocolError
    from hosl_flower.export.export import export_run as export_run
    from hosl_flower.export.finished_run import read_run as read_run
    from hosl_flower.export.generate import continuation as continuation
    from hosl_flower.export.trained_model import open_trained as open_trained
    from hosl_flower.flower.strategy import SplitStrategy as SplitStrategy
    from hosl_flower.ledger.client_state import ClientState as ClientState
    from hosl_flower.ledger.ledger import Entry as Entry
    from hosl_flower.ledger.ledger import Ledger as Ledger
    from hosl_flower.methods.load import load_method as load_method
    from hosl_flower.methods.method import Method as Method
    from hosl_flower.models.base_model import open_base as open_base
    from hosl_flower.models.lora import Lora as Lora
    from hosl_flower.models.split import load_client as load_client
    from hosl_flower.models.split import load_server as load_server
    from hosl_flower.models.submodels import trainable_parameters as trainable_parameters
    from hosl_flower.run.start import run_in_process as run_in_process
    from hosl_flower.server.cohort import Cohort as Cohort
    from hosl_flower.server.link import Link as Link
    from hosl_flower.server.session import Session as Session
    from hosl_flower.zo.directions import Layout as Layout
    from hosl_flower.zo.estimator import estimate as estimate
    from hosl_flower.zo.perturbed import perturbed as perturbed
