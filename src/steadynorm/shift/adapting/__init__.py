"""Running statistics mixed with those of new data, with guards, and undone with one call."""
