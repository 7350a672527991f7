"""Experiments that show what clipping does: `python -m experiments --help`."""
