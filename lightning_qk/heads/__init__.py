"""The query and key weights of any model, per head: the only place that knows weight layouts."""
