"""Two sides in, a report on their shift out."""
