"""Trains the built-in emoji models again: data, pictures, networks, training, evaluation (see README.md)."""
