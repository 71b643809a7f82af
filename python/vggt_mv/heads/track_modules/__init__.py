"""The point tracker and its parts."""
