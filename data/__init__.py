"""What an image is before training: catalogue, readers, Parquet shards, batches."""
