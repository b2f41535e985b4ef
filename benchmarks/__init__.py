"""Measurements against peers, each side in one run on one machine."""
