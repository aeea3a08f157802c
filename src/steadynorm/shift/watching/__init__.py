"""A model against the data that it is served."""
