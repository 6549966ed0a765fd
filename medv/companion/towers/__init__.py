"""The towers of `tiny`, trained on generated data, and those of `small`, from packages of the Python index."""
