"""A node and its actors."""
