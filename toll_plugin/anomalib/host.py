"""The private names of anomalib 2.7, Lightning and torchvision that this package uses.

None of them is promised to stay. They are listed once, here, with what breaks without each; a test looks for them
in the installed versions, so that an upgrade that lost one fails by its name. What the package uses besides is
public: hooks and attributes without a leading underscore, and the layers that ``collapsed.py`` names, each of
which a fit in the tests needs.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PRIVATE_NAMES", "PrivateName"]


class PrivateName(NamedTuple):
    """One private name of a host.

    Attributes:
        owner: Import path of the class that has it.
        name: Attribute, method or property.
        used_in: Module of ``toll_plugin.anomalib`` that uses it.
        without_it: What would break.
    """

    owner: str
    name: str
    used_in: str
    without_it: str


_POST_PROCESSOR = "anomalib.post_processing.PostProcessor"
_DATASET = "anomalib.data.AnomalibDataset"
_DATA_MODULE = "anomalib.data.AnomalibDataModule"

PRIVATE_NAMES = (
    PrivateName(_POST_PROCESSOR, "_normalize", "post_processor", "normalised scores are clipped, which ties them"),
    PrivateName(
        _POST_PROCESSOR, "_image_threshold_metric", "post_processor", "the threshold comes from sigmoids of the scores"
    ),
    PrivateName(_POST_PROCESSOR, "_pixel_threshold_metric", "post_processor", "the same for maps"),
    PrivateName(_POST_PROCESSOR, "_image_threshold", "post_processor", "calibrate has nowhere to put a threshold"),
    PrivateName(
        _POST_PROCESSOR, "_pixel_threshold", "post_processor", "neither has calibrate, nor validation without masks"
    ),
    PrivateName(_POST_PROCESSOR, "_checkpoint_config_keys", "post_processor", "checkpoints forget the quantile"),
    PrivateName(_DATASET, "_samples", "datasets", "the public setter refuses samples whose paths are no files"),
    PrivateName(_DATA_MODULE, "_setup", "one_vs_rest", "no split is made"),
    PrivateName(_DATA_MODULE, "_create_test_split", "one_vs_rest", "the host splits again, at random"),
    PrivateName(_DATA_MODULE, "_create_val_split", "one_vs_rest", "the host splits again, at random"),
    PrivateName(_DATA_MODULE, "_category", "one_vs_rest", "results lie in a folder without the class's name"),
    PrivateName(
        "lightning.pytorch.LightningModule",
        "_trainer",
        "toll.lightning_model",
        "a model without a trainer cannot be saved",
    ),
    PrivateName(
        "lightning.pytorch.core.mixins.HyperparametersMixin",
        "_hparams_initial",
        "mixin",
        "loggers miss the weights that a class of models sets",
    ),
    PrivateName(
        "torchvision.transforms.v2.Transform", "_transformed_types", "pre_processor", "masks are scaled like images"
    ),
)
