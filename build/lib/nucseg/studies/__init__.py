"""Studies, sets of related runs: cross-validation, variants and grids."""
