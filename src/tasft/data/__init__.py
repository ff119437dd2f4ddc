"""Rows and prompts: read, checked, encoded."""
