"""Weights on disk: released or bundled; read, assembled, converted and identified."""
