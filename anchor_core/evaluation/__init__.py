"""Scores of pictures of any system, and how results are drawn."""
