"""The papers' tables: their rows and figures, the trials that train them, the report."""
