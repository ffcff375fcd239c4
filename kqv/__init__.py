"""The plumbing that the scripts share. Nothing in here knows the model or a script."""
