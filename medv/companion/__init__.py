"""What the notebooks need and the library does not. Only the command line imports it."""
