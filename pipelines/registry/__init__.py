"""MLflow tracking and the model registry. No other package imports mlflow."""
