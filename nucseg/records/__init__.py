"""What a run leaves on disk: where it comes from, reading it back, and the statistics of its scores.

A room of its own because training writes runs and studies, figures and the book read them.
"""
