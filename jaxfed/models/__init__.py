"""Recommenders as Flax modules, and the controls they are held against."""
