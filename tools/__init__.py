"""What a checkout runs and no wheel has. Nothing in `lightning_qk` imports it."""
