"""Metrics, and how models are ranked."""
