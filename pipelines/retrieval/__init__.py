"""Retrieval metrics, evaluation under the protocols, and plots."""
