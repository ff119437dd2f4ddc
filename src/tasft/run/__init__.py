"""A recipe and what becomes of it."""
