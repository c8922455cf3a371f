"""Noisy labels: `synthetic` makes them, `human` reads those of people, `file` saves them for several runs."""

from dividemix.noise import human
from dividemix.noise.file import NoiseSpec, noisy_labels, wrong_share
from dividemix.noise.synthetic import DEFINITIONS, MODES, asym_transition, inject
