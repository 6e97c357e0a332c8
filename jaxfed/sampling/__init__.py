"""Who takes part in a round, and when."""
