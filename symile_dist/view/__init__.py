"""What a person sees of a run: in a terminal, and as a web page."""

STRAGGLER_RATIO = 1.3
"""Of a rank's own work and the median rank's: from here on it is called a straggler."""
