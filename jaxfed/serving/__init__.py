"""Recommendations over HTTP from an export."""
