"""Batch normalization for PyTorch: three verbs (measure, normalize, commit) over one noun (Moments)."""
