"""Plots, tables and token pictures that several studies share."""
