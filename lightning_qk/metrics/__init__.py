"""torchmetrics that accumulate per-head statistics and reduce them over ranks."""
