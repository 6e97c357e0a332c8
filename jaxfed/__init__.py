"""jaxfed: federated learning of recommender models in JAX."""

__version__ = "0.1.0"
