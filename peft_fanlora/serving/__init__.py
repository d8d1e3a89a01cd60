"""Serving many adapters at once, shared by both methods."""
