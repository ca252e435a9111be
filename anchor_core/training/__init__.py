"""The training: one run from pictures to a saved file, its loop, its settings, and what it can be resumed from."""
