"""Saved adapters, their cards and the Hub; which methods there are, `register` says."""
