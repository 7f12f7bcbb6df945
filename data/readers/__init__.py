"""Readers: one file for each kind of source that ingest accepts."""
