"""A program: its first seconds, its output, its folder's lock, and how it ends."""
