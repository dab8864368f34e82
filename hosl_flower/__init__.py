"""hosl-flower: split federated fine-tuning for devices that cannot back-propagate.

The client submodel learns by zeroth-order probing (forward passes only), the server
submodel by first-order back-propagation. See CONTRIBUTING.md for the map of the modules.
"""

__version__ = "0.1.0"
