"""Rendering of results as tables, pictures, Markdown and HTML."""
