"""Two sources in, two sides out: facts of all rows, and a sample."""
