"""Initialisations on disk: what is in the folder, how it is written, how it is checked when it is read."""
