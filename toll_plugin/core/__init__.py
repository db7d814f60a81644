"""The method: objective, networks, training, tables. Needs torch and NumPy only, knows no host."""

from toll_plugin._public import publish
from toll_plugin.core.diagnostics import CollapseMonitor, Finding, TollWarning
from toll_plugin.core.image_scaling import ImageScaling, contrast_normalise, contrast_range
from toll_plugin.core.layers import LayerPass
from toll_plugin.core.networks import Autoencoder, ConvAutoencoder, DenseAutoencoder
from toll_plugin.core.objective import TollLoss, TollTerms, toll_score, toll_slopes, toll_terms
from toll_plugin.core.paper_networks import Paper28Autoencoder, Paper32Autoencoder
from toll_plugin.core.patches.fit import fit_patches
from toll_plugin.core.patches.model import PatchAutoencoder
from toll_plugin.core.penalty import TargetedCollapse, latent_norm
from toll_plugin.core.tables.fit import fit_table
from toll_plugin.core.tables.model import ResidualMetric, TableModel
from toll_plugin.core.tables.scaling import TableScaling
from toll_plugin.core.training.divergence import DivergenceError
from toll_plugin.core.training.fit import History, fit, fit_ensemble, terms_of

__all__ = [
    "Autoencoder",
    "CollapseMonitor",
    "ConvAutoencoder",
    "DenseAutoencoder",
    "DivergenceError",
    "Finding",
    "History",
    "ImageScaling",
    "LayerPass",
    "Paper28Autoencoder",
    "Paper32Autoencoder",
    "PatchAutoencoder",
    "ResidualMetric",
    "TableModel",
    "TableScaling",
    "TargetedCollapse",
    "TollLoss",
    "TollTerms",
    "TollWarning",
    "contrast_normalise",
    "contrast_range",
    "fit",
    "fit_ensemble",
    "fit_patches",
    "fit_table",
    "latent_norm",
    "terms_of",
    "toll_score",
    "toll_slopes",
    "toll_terms",
]

publish(__name__)
