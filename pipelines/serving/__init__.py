"""Search as a service: an encoder, a deployment for each shard, and a gateway with a page, on Ray Serve."""
