"""What the three scripts and the detectors stand on. Nothing in here is run by itself."""
