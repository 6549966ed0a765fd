"""The drawing of phantoms, one module per domain on top of `canvas` (coordinates, noise, shapes) and `cells` (nuclei)."""
