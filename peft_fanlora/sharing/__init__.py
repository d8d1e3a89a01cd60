"""Saved adapters, model cards and the Hub, independent of the methods, which `register` provides."""
