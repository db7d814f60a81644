"""Toll for anomalib. Importing this package registers its classes with anomalib by name."""

from importlib import import_module

from toll_plugin._public import publish
from toll_plugin.anomalib import collapsed
from toll_plugin.anomalib.callbacks import RestoreBestWeights
from toll_plugin.anomalib.collapsed import (
    CollapsedDinomaly,
    CollapsedDraem,
    CollapsedEfficientAd,
    CollapsedFre,
    CollapsedGanomaly,
    CollapsedGlass,
    CollapsedInpFormer,
    CollapsedReverseDistillation,
    CollapsedSupersimplenet,
    CollapsedUniNet,
)
from toll_plugin.anomalib.datamodules import (
    CIFAR10OneVsRest,
    CIFAR100OneVsRest,
    DigitsOneVsRest,
    FashionMNISTOneVsRest,
    ImageSetOneVsRest,
    MNISTOneVsRest,
)
from toll_plugin.anomalib.datasets import TensorImageDataset
from toll_plugin.anomalib.joined_folders import JoinedFolders
from toll_plugin.anomalib.mixin import TargetedCollapseMixin
from toll_plugin.anomalib.one_vs_rest import OneVsRest
from toll_plugin.anomalib.patch_toll.lightning_model import PatchToll
from toll_plugin.anomalib.patch_toll.torch_model import PatchTollModel
from toll_plugin.anomalib.post_processor import QuantilePostProcessor, TollPostProcessor
from toll_plugin.anomalib.pre_processor import TollPreProcessor
from toll_plugin.anomalib.toll.lightning_model import Toll
from toll_plugin.anomalib.toll.torch_model import TollModel

__all__ = [
    "CIFAR10OneVsRest",
    "CIFAR100OneVsRest",
    "CollapsedDinomaly",
    "CollapsedDraem",
    "CollapsedEfficientAd",
    "CollapsedFre",
    "CollapsedGanomaly",
    "CollapsedGlass",
    "CollapsedInpFormer",
    "CollapsedReverseDistillation",
    "CollapsedSupersimplenet",
    "CollapsedUniNet",
    "DigitsOneVsRest",
    "FashionMNISTOneVsRest",
    "ImageSetOneVsRest",
    "JoinedFolders",
    "MNISTOneVsRest",
    "OneVsRest",
    "PatchToll",
    "PatchTollModel",
    "QuantilePostProcessor",
    "RestoreBestWeights",
    "TargetedCollapseMixin",
    "TensorImageDataset",
    "Toll",
    "TollModel",
    "TollPostProcessor",
    "TollPreProcessor",
]

publish(__name__)

# anomalib's CLI finds subclasses, but its get_model and benchmark look for attributes. Not
# `import anomalib.models`: this also runs while that import is still under way.
_MODELS = (Toll, PatchToll, *(getattr(collapsed, name) for name in collapsed.__all__))
_DATA = (
    DigitsOneVsRest,
    MNISTOneVsRest,
    FashionMNISTOneVsRest,
    CIFAR10OneVsRest,
    CIFAR100OneVsRest,
    JoinedFolders,
)
for _package, _classes in (("anomalib.models", _MODELS), ("anomalib.data", _DATA)):
    for _class in _classes:
        setattr(import_module(_package), _class.__name__, _class)
