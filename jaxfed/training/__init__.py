"""Runs: loops, folders, checkpoints, logs."""
