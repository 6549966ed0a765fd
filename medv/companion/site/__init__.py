"""The site: notebooks with their outputs, every figure and table, the code in reading order, the API; `make docs` builds it."""
