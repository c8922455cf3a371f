"""A trained run, used: `ensemble` makes one network of its networks, `predict` classifies images, and `export` writes
one file that needs PyTorch alone."""

from dividemix.deploy.ensemble import Ensemble, load_ensemble, probabilities, to_images

__all__ = [
    "Ensemble",
    "load_ensemble",
    "probabilities",
    "to_images",
]
