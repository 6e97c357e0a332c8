"""Models that leave jaxfed: what a run has learnt as files that JAX and NumPy alone can run."""
