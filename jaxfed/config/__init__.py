"""Configurations, and what is built of them."""
