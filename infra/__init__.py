"""What runs the pipeline elsewhere: storage checks, cluster and job files."""
