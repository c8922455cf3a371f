"""What uses a trained run: `ensemble` makes one network of its networks, `predict` classifies images, `export` writes a
file that needs only PyTorch."""

from dividemix.deploy.ensemble import Ensemble, load_ensemble, probabilities, to_images

__all__ = [
    "Ensemble",
    "load_ensemble",
    "probabilities",
    "to_images",
]
