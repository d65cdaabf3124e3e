"""The views, in a blueprint for each subject."""
