"""Recorded runs: their provenance, reading them back, and the statistics of their scores.

Training writes these records; studies, figures and the book read them.
"""
