"""The loss terms, one family per file. Every function takes the whole (gathered) batch."""
