"""Weights on disk: released, bundled or from packages; read, assembled, converted and identified."""
