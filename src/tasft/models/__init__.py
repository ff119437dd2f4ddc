"""Models and who answers for them."""
