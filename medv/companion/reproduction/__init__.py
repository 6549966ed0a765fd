"""`medv reproduce`: the graph of notebooks, its cache, its runs and its index page."""
