"""Parts of the command line that are commands of their own."""
