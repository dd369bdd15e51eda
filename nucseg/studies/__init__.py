"""Studies, which are runs that belong together: cross-validation, variants and grids."""
