"""One file per notebook or group of notebooks: settings, computation, table, figure and claims."""
