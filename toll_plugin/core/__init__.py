"""The method: objective, networks, training. Needs torch only, knows no host."""

from toll_plugin.core.diagnostics import CollapseMonitor, Finding, TollWarning
from toll_plugin.core.divergence import DivergenceError
from toll_plugin.core.networks import Autoencoder, ConvAutoencoder, DenseAutoencoder
from toll_plugin.core.objective import TollLoss, TollTerms, toll_score, toll_terms
from toll_plugin.core.paper_networks import Paper28Autoencoder, Paper32Autoencoder
from toll_plugin.core.scaling import ImageScaling, contrast_normalise, contrast_range
from toll_plugin.core.training import History, fit, fit_ensemble, terms_of

__all__ = [
    "Autoencoder",
    "CollapseMonitor",
    "ConvAutoencoder",
    "DenseAutoencoder",
    "DivergenceError",
    "Finding",
    "History",
    "ImageScaling",
    "Paper28Autoencoder",
    "Paper32Autoencoder",
    "TollLoss",
    "TollTerms",
    "TollWarning",
    "contrast_normalise",
    "contrast_range",
    "fit",
    "fit_ensemble",
    "terms_of",
    "toll_score",
    "toll_terms",
]
