"""Interactions, clients, batches and blocks."""
