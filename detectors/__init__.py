"""Every other method on the same normal images, one file a method: `python -m detectors.rotnet`.

To add one, add a file here and its scores to SCORES in evaluate.py.
"""
