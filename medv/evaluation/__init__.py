"""Measures: question answering, findings, text."""
