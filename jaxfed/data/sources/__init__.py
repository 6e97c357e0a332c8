"""Where data come from: files, MovieLens, synthetic populations."""
