"""How results are shown: figures, tables and the index page."""
