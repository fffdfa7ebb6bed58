"""Where statistics go: histories, loggers, figures, the health table and the report."""
