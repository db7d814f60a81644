"""Targeted collapse regularised autoencoders (Toll) for anomaly detection.

Importing this package loads neither torch nor a host library. The method lives in
:mod:`toll_plugin.core`, its adapters in :mod:`toll_plugin.anomalib` and :mod:`toll_plugin.pyod`.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
