"""Models in use: reading them, and generating text with them."""
