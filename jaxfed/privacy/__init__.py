"""What noise costs in epsilon, and searches for what it does not cover."""
