"""The method: objective, networks, training, tables. Needs torch and NumPy only, knows no host."""

from toll_plugin._public import publish
from toll_plugin.core.diagnostics import CollapseMonitor, Finding, TollWarning
from toll_plugin.core.image_scaling import ImageScaling, contrast_normalise, contrast_range
from toll_plugin.core.layers import LayerPass
from toll_plugin.core.networks import Autoencoder, ConvAutoencoder, DenseAutoencoder
from toll_plugin.core.objective import TollLoss, TollTerms, terms_of_residual, toll_score, toll_slopes, toll_terms
from toll_plugin.core.paper_networks import Paper28Autoencoder, Paper32Autoencoder
from toll_plugin.core.patches.model import PatchAutoencoder, fit_patches
from toll_plugin.core.penalty import TargetedCollapse, latent_norm
from toll_plugin.core.tables.fit import FittedTable, TableSplit, fit_table, hold_out, rehearse
from toll_plugin.core.tables.metric import ResidualMetric
from toll_plugin.core.tables.model import TableModel
from toll_plugin.core.tables.scaling import TableScaling
from toll_plugin.core.training.divergence import DivergenceError
from toll_plugin.core.training.fit import History, fit, fit_ensemble, terms_of
from toll_plugin.core.training.options import TrainingOptions

__all__ = [
    "Autoencoder",
    "CollapseMonitor",
    "ConvAutoencoder",
    "DenseAutoencoder",
    "DivergenceError",
    "Finding",
    "FittedTable",
    "History",
    "ImageScaling",
    "LayerPass",
    "Paper28Autoencoder",
    "Paper32Autoencoder",
    "PatchAutoencoder",
    "ResidualMetric",
    "TableModel",
    "TableScaling",
    "TableSplit",
    "TargetedCollapse",
    "TollLoss",
    "TollTerms",
    "TollWarning",
    "TrainingOptions",
    "contrast_normalise",
    "contrast_range",
    "fit",
    "fit_ensemble",
    "fit_patches",
    "fit_table",
    "hold_out",
    "latent_norm",
    "rehearse",
    "terms_of",
    "terms_of_residual",
    "toll_score",
    "toll_slopes",
    "toll_terms",
]

publish(__name__)
