"""Real federation: the rounds of the simulator between processes, on Flower."""
