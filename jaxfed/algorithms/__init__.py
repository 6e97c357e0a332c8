"""Federated methods, a file each."""
