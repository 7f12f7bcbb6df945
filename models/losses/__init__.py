"""The loss terms, a family per file; every function takes whole (gathered) batches."""
