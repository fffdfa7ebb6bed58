"""Early warning of collapse: running statistics and detectors that know nothing of Lightning."""
