"""The interactive explorer: a session that remembers its runs, its views and its widgets."""
