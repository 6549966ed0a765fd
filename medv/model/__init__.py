"""The network in transformers' own terms: configuration, modeling, processing."""
