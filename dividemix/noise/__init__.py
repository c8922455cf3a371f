"""Noisy labels: `synthetic` makes them, `human` reads those that people gave, and `file` saves them in a file that
several runs share."""

from dividemix.noise import human
from dividemix.noise.file import NoiseSpec, noisy_labels, wrong_share
from dividemix.noise.synthetic import DEFINITIONS, MODES, asym_transition, inject

__all__ = ["DEFINITIONS", "MODES", "NoiseSpec", "asym_transition", "human", "inject", "noisy_labels", "wrong_share"]
