"""Runs beside each other: what differs, paired tests over users, and a page of them."""
