"""Sources, splits, clients and batches, all in NumPy."""
