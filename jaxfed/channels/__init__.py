"""Links: the update path, one mechanism a file."""
