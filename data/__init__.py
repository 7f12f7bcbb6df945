"""Data before training: the catalogue of datasets, readers, Parquet shards, batches."""
