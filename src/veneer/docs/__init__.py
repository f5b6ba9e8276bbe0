"""The methods' pages, made from the registry: `python -m veneer.docs` writes docs/methods."""
