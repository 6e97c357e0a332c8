"""Secure aggregation between parties who exchange bytes."""
