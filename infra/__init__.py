"""Deployment: storage checks, cluster and job templates."""
