"""The method: objective, networks, training, tables. Needs torch and NumPy only, knows no host."""

from toll_plugin._public import publish
from toll_plugin.core.diagnostics import CollapseMonitor, Finding, TollWarning
from toll_plugin.core.guarantee import images_needed, promised_rate, threshold_rank
from toll_plugin.core.image_scaling import ImageScaling, contrast_normalise, contrast_range, standard_range
from toll_plugin.core.layers import LayerPass
from toll_plugin.core.networks import Autoencoder, ConvAutoencoder, DenseAutoencoder
from toll_plugin.core.objective import (
    TollLoss,
    TollTerms,
    in_units,
    relative_pressure,
    terms_of_residual,
    toll_score,
    toll_slopes,
    toll_terms,
    typical,
    typical_terms,
)
from toll_plugin.core.paper_networks import Paper28Autoencoder, Paper32Autoencoder
from toll_plugin.core.patches.fit import fit_patches
from toll_plugin.core.patches.model import PatchAutoencoder
from toll_plugin.core.patches.whole import ImageScore, ImageTerms
from toll_plugin.core.penalty import TargetedCollapse, latent_norm
from toll_plugin.core.score import TollScore
from toll_plugin.core.tables.distant import DistantTable
from toll_plugin.core.tables.fit import FittedTable, TableSplit, TrainedMember, fit_table, hold_out, rehearse
from toll_plugin.core.tables.metric import MahalanobisNorm
from toll_plugin.core.tables.model import Measure, TableMember, TableModel
from toll_plugin.core.tables.scaling import TableScaling
from toll_plugin.core.training.divergence import DivergenceError
from toll_plugin.core.training.fit import History, fit, fit_ensemble, terms_of
from toll_plugin.core.training.optimizers import cosine_adam
from toll_plugin.core.training.options import TrainingOptions

__all__ = [
    "Autoencoder",
    "CollapseMonitor",
    "ConvAutoencoder",
    "DenseAutoencoder",
    "DistantTable",
    "DivergenceError",
    "Finding",
    "FittedTable",
    "History",
    "ImageScaling",
    "ImageScore",
    "ImageTerms",
    "LayerPass",
    "MahalanobisNorm",
    "Measure",
    "Paper28Autoencoder",
    "Paper32Autoencoder",
    "PatchAutoencoder",
    "TableMember",
    "TableModel",
    "TableScaling",
    "TableSplit",
    "TargetedCollapse",
    "TollLoss",
    "TollScore",
    "TollTerms",
    "TollWarning",
    "TrainedMember",
    "TrainingOptions",
    "contrast_normalise",
    "contrast_range",
    "cosine_adam",
    "fit",
    "fit_ensemble",
    "fit_patches",
    "fit_table",
    "hold_out",
    "images_needed",
    "in_units",
    "latent_norm",
    "promised_rate",
    "rehearse",
    "relative_pressure",
    "standard_range",
    "terms_of",
    "terms_of_residual",
    "threshold_rank",
    "toll_score",
    "toll_slopes",
    "toll_terms",
    "typical",
    "typical_terms",
]

publish(__name__)
