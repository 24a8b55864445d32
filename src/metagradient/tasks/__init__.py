"""Applications: one file each, on top of the descent."""
