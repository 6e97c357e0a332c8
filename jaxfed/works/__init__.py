"""Works: what one client computes, one idea a file."""
