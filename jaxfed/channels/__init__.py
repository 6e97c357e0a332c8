"""Links: what happens to an update on its way to the server."""
