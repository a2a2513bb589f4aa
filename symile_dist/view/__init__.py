"""What a person sees of a run: in a terminal, and as a web page."""
