"""Searches over the methods' hyper-parameters."""
