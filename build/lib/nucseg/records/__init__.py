"""Recorded runs: `provenance` makes the text of run.json, `runs` reads it back, `statistics` means and intervals.

Training writes these records; studies, figures and the book read them.
"""
