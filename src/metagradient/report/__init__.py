"""What a run leaves for people: figures, and one self-contained HTML page."""
