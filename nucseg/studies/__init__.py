"""Runs that belong together: cross-validation, variants and grids."""
