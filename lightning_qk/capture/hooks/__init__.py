"""Where attention calls of a running model are seen, one module for each place."""
